"""Hugging Face directories: config.json and safetensors, read and written, plain or quantised by a Precision.

A served directory holds, for each tensor `X.weight`, the parts that its precision makes of it under `X.<suffix>`, and
the precision's `quantization_config`. What is read is checked against `Model.params()`: every tensor there, none
beside, shapes and dtypes as expected, all finite. One tensor is in memory at a time while writing, one shard's worth
while it is buffered. Only safetensors are read: a pickled .bin is refused.
Left out: tokenizers (tokenizer.py), multi-token-prediction layers, biases other than those of q, k and v.
Source: the configuration classes of transformers 5.17; older ones read the same file (rope_theta, rope_scaling).
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lpexp.data import Param
from lpexp.disk import sync, sync_tree, write_json
from lpexp.errors import ConfigError, RunError
from lpexp.model import Mla, Model, Moe, RopeScaling
from lpexp.precision import Parts, Precision, from_hf

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 4 * 2**30
SHOWN = 8  # problems listed of one directory
# Copied from the model's own directory, so that an exported one can be served as it is.
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tiktoken.model",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


# -- config.json -------------------------------------------------------------------------------------------------------


def config_json(model: Model) -> dict[str, Any]:
    """The config.json that transformers (5.17, and 4.x) and SGLang build this model from."""
    _judge_export(model)
    config: dict[str, Any] = {
        "architectures": [CLASSES[model.architecture]],
        "model_type": model.architecture,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_dropout": 0.0,
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.initializer_range,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    }
    if model.rope_scaling:
        scaling = {"rope_type": "yarn", "type": "yarn", **model.rope_scaling.model_dump()}
        config |= {"rope_scaling": scaling, "rope_parameters": scaling | {"rope_theta": model.rope_theta}}
    if model.architecture.startswith("qwen"):
        config |= {"use_sliding_window": False, "sliding_window": None}
    if model.architecture != "qwen2":  # whose q, k and v always have one
        config["attention_bias"] = False
    if model.moe and model.architecture == "qwen3_moe":
        config |= {
            "num_experts": model.moe.num_experts,
            "num_experts_per_tok": model.moe.top_k,
            "moe_intermediate_size": model.moe.intermediate_size,
            "norm_topk_prob": model.moe.norm_topk,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(model.moe.first_dense)),
        }
    if model.moe and model.mla:
        config |= {
            "n_routed_experts": model.moe.num_experts,
            "num_experts_per_tok": model.moe.top_k,
            "moe_intermediate_size": model.moe.intermediate_size,
            "n_shared_experts": model.moe.num_shared,
            "first_k_dense_replace": model.moe.first_dense,
            "moe_layer_freq": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": model.moe.norm_topk,
            "routed_scaling_factor": model.moe.scaling,
            "n_group": model.moe.num_groups,
            "topk_group": model.moe.top_groups,
            "rope_interleave": True,
            "num_nextn_predict_layers": 0,
            **model.mla.model_dump(),
        }
        config["head_dim"] = model.mla.qk_rope_head_dim  # what transformers means by it here
    return config


def model_from_config(config: Mapping[str, Any], name: str, path: str | None) -> Model:
    """The Model behind a config.json; ConfigError for an architecture or an option that the decoder does not have."""
    where = f"{path or name}/{CONFIG}"
    classes = config.get("architectures") or []
    architecture = next((a for a, cls in CLASSES.items() if cls in classes), None)
    if architecture is None and not classes and config.get("model_type") in CLASSES:
        architecture = config["model_type"]
    if architecture is None:
        named = ", ".join(classes) or config.get("model_type") or "none named"
        raise ConfigError(f"{where}: architecture {named} is not supported; supported: {', '.join(CLASSES.values())}")
    _judge_import(config, architecture, where)
    try:
        return _read_config(config, architecture, name, path)
    except KeyError as error:
        raise ConfigError(f"{where}: key {error} is missing") from None
    except ValueError as error:  # pydantic's refusal of a value
        raise ConfigError(f"{where}: {error}") from None


def _read_config(config: Mapping[str, Any], architecture: str, name: str, path: str | None) -> Model:
    heads = config["num_attention_heads"]
    rope = _rope(config)
    moe: dict[str, Any] | None = None
    mla: dict[str, Any] | None = None
    if architecture == "qwen3_moe":
        moe = {
            "num_experts": config["num_experts"] if "num_experts" in config else config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "intermediate_size": config["moe_intermediate_size"],
            "first_dense": len(config.get("mlp_only_layers") or ()),
            "norm_topk": config.get("norm_topk_prob", False),
        }
    head_dim = config.get("head_dim") or (128 if architecture == "qwen3" else config["hidden_size"] // heads)
    if architecture == "deepseek_v3":
        mla = {key: config[key] for key in Mla.model_fields}
        head_dim = mla["v_head_dim"]
        moe = {
            "num_experts": config["n_routed_experts"],
            "top_k": config["num_experts_per_tok"],
            "intermediate_size": config["moe_intermediate_size"],
            "num_shared": config.get("n_shared_experts") or 0,
            "first_dense": config["first_k_dense_replace"],
            "scoring": "sigmoid",
            "norm_topk": config["norm_topk_prob"],
            "scaling": config["routed_scaling_factor"],
            "num_groups": config.get("n_group") or 1,
            "top_groups": config.get("topk_group") or 1,
        }
    return Model(
        name=name,
        architecture=architecture,  # type: ignore[arg-type]
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=float(rope["rope_theta"]),
        rms_norm_eps=config["rms_norm_eps"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        max_position_embeddings=config["max_position_embeddings"],
        initializer_range=config.get("initializer_range", 0.02),
        moe=Moe.model_validate(moe) if moe else None,
        mla=Mla.model_validate(mla) if mla else None,
        rope_scaling=_yarn(rope),
        path=path,
    )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one dict, from the place of transformers 5 or that of 4."""
    rope = dict(config.get("rope_parameters") or {}) or dict(config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def _yarn(rope: Mapping[str, Any]) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    # Without mscale transformers scales by 0.1 ln(factor) + 1, which is what mscale 1 and mscale_all_dim 0 give.
    return RopeScaling.model_validate({key: rope[key] for key in RopeScaling.model_fields if rope.get(key)})


def _judge_import(config: Mapping[str, Any], architecture: str, where: str) -> None:
    """Options that change the forward pass and that the decoder does not have."""
    rope = _rope(config)
    layers = config.get("num_hidden_layers", 0)
    dense = config.get("mlp_only_layers") or []
    refused = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "rope_parameters": rope["rope_type"] not in ("default", "yarn"),
        "rope_parameters.attention_factor": rope.get("attention_factor") is not None,
        "rope_parameters.truncate": rope.get("truncate") is False,
        "attention_bias": architecture != "qwen2" and bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "decoder_sparse_step": architecture == "qwen3_moe" and config.get("decoder_sparse_step", 1) != 1,
        "mlp_only_layers": list(dense) != list(range(len(dense))) or len(dense) > layers,
        "scoring_func": architecture == "deepseek_v3" and config.get("scoring_func", "sigmoid") != "sigmoid",
        "topk_method": architecture == "deepseek_v3" and config.get("topk_method", "noaux_tc") != "noaux_tc",
        "rope_interleave": architecture == "deepseek_v3" and config.get("rope_interleave", True) is not True,
        "moe_layer_freq": architecture == "deepseek_v3" and config.get("moe_layer_freq", 1) != 1,
    }
    found = [f"{key}={config.get(key, rope.get(key.split('.')[-1]))!r}" for key, wrong in refused.items() if wrong]
    if found:
        raise ConfigError(f"{where}: {', '.join(found)} is not supported by the decoder for {architecture}")


def _judge_export(model: Model) -> None:
    """What a Model may say and no class of transformers can."""
    moe = model.moe
    refused = {
        "attention_bias (transformers also gives o_proj one)": model.attention_bias and model.architecture != "qwen2",
        "moe.scoring": moe is not None and (moe.scoring == "sigmoid") != (model.architecture == "deepseek_v3"),
        "moe.num_shared, scaling or groups": (
            moe is not None
            and model.architecture == "qwen3_moe"
            and (moe.num_shared, moe.scaling, moe.num_groups) != (0, 1.0, 1)
        ),
        "moe.num_shared": moe is not None and model.architecture == "deepseek_v3" and moe.num_shared == 0,
    }
    found = [key for key, wrong in refused.items() if wrong]
    if found:
        raise ConfigError(
            f"model {model.name}: no Hugging Face {model.architecture} config can say its {', '.join(found)}"
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def save(
    directory: str | Path,
    model: Model,
    tensors: Iterable[tuple[str, Tensor]],
    precision: Precision,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a directory that serves `model` in `precision`; it appears whole or not at all.

    `tensors` gives every tensor of `model.params()` once, in any order; NonFiniteWeightError names one with a NaN.
    A shard is at most `shard_bytes`, or one tensor's parts where those are more.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists already; remove it or choose another directory")
    params, moe = list(model.params()), model.moe is not None
    config = config_json(model)
    quantization = precision.hf(params, moe)
    dtypes: set[str] = set()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temp = directory.with_name(f".tmp-{directory.name}-{os.getpid()}")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    try:
        _write_shards(temp, _serve(params, tensors, precision, moe, dtypes), shard_bytes)
        # The dtype of what is left unquantised, which is also that of the activations.
        dtype = "bfloat16" if "torch.bfloat16" in dtypes else "float32"
        config |= {"dtype": dtype, "torch_dtype": dtype}
        if quantization is not None:
            config["quantization_config"] = quantization
        write_json(temp / CONFIG, config)
        for name in BESIDE:
            if model.path and (Path(model.path) / name).is_file():
                shutil.copyfile(Path(model.path) / name, temp / name)
        sync_tree(temp)
        temp.rename(directory)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    sync(directory.parent)
    return directory


def convert(source: str | Path, directory: str | Path, precision: Precision, shard_bytes: int = SHARD_BYTES) -> Path:
    """Read a 16- or 32-bit directory and write it in `precision`, one tensor in memory at a time."""
    model = read_model(source)
    mistakes = list(precision.judge(list(model.params()), model.moe is not None))
    if mistakes:
        raise ConfigError(mistakes, f"{source} cannot be quantised like this:")
    return save(directory, model, read_weights(source, model), precision, shard_bytes)


def part_name(name: str, suffix: str) -> str:
    """The stored name of one part of a tensor: ("a.weight", "weight_scale") -> "a.weight_scale"."""
    if name.endswith(".weight"):
        return name.removesuffix("weight") + suffix
    assert suffix == "weight", f"{name} is no weight, it cannot have a part {suffix}"
    return name


def _serve(
    params: list[Param], tensors: Iterable[tuple[str, Tensor]], precision: Precision, moe: bool, dtypes: set[str]
) -> Iterator[dict[str, Tensor]]:
    """{stored name: part} of each tensor that comes; RunError when one is unknown, misshapen, twice or not there."""
    from lpexp.precision.wire import side

    waiting = {param.name: param for param in params}
    for name, tensor in tensors:
        param = waiting.pop(name, None)
        if param is None:
            raise RunError(f"{name} is no tensor of this model, or came twice")
        if tuple(tensor.shape) != param.shape:
            raise RunError(f"{name} has shape {list(tensor.shape)}, the model's is {list(param.shape)}")
        parts = side(param, precision, moe).quantize(tensor, name)
        if not precision.covers(param, moe):
            dtypes.update(str(part.dtype) for part in parts.values())
        # Copied: an unquantised part may be the caller's own tensor, which it may overwrite before the shard is full.
        yield {part_name(name, suffix): part.cpu().contiguous().clone() for suffix, part in parts.items()}
    if waiting:
        raise RunError(f"{len(waiting)} tensors of the model did not come: {_some(waiting)}")


def _write_shards(directory: Path, groups: Iterable[dict[str, Tensor]], limit: int) -> None:
    """Fill shard after shard; their number is known only at the end, so they are named then."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        nonlocal pending, held
        if pending:
            save_file(pending, directory / f"{len(shards)}.part", {"format": "pt"})
            shards.append(list(pending))
            pending, held = {}, 0

    for parts in groups:
        size = sum(part.nbytes for part in parts.values())
        if held + size > limit:
            flush()
        pending |= parts
        held, total = held + size, total + size
    flush()
    places = {}
    for i, names in enumerate(shards):
        shard = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{i}.part").rename(directory / shard)
        places |= dict.fromkeys(names, shard)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


# -- reading -----------------------------------------------------------------------------------------------------------


def read_model(directory: str | Path) -> Model:
    """The Model that a directory's config.json describes, with `path` set to it."""
    directory = Path(directory)
    return model_from_config(_read_json(directory / CONFIG), directory.name, str(directory))


def load(directory: str | Path) -> tuple[Model, Precision | None, dict[str, Parts]]:
    """A served directory as its model, its precision (None when it is not quantised) and {tensor name: parts}.

    ConfigError lists every missing, unexpected or misshapen tensor with its file. Parts are what is stored, bit
    for bit, but for int32 where the precision has int64, which is widened.
    """
    directory = Path(directory)
    model = read_model(directory)
    params, moe = list(model.params()), model.moe is not None
    quantization = _read_json(directory / CONFIG).get("quantization_config")
    try:
        precision = from_hf(quantization, params, moe) if quantization else None
    except ConfigError as error:
        raise ConfigError(f"{directory / CONFIG}: {error}") from None
    expected = _Layouts(precision, moe)
    with _Tensors(directory) as stored:
        stored.check(model, {param.name: expected(param) for param in params})
        weights = {
            param.name: {suffix: stored.get(part_name(param.name, suffix)) for suffix in expected(param)}
            for param in params
        }
        for param in params:
            for suffix, (_, dtype) in expected(param).items():
                part = weights[param.name][suffix]
                if dtype is not None and part.dtype != dtype:
                    weights[param.name][suffix] = part.to(dtype)
                if part.is_floating_point():
                    stored.check_finite(part_name(param.name, suffix), part)
    return model, precision, weights


def load_weights(directory: str | Path, model: Model) -> dict[str, Tensor]:
    """{name: float32 tensor} of an unquantised directory (bf16, fp16 or fp32), for exactly the tensors of `model`."""
    return dict(read_weights(directory, model))


def read_weights(directory: str | Path, model: Model) -> Iterator[tuple[str, Tensor]]:
    """As `load_weights`, one tensor at a time in the model's order. ConfigError names file and tensor."""
    directory = Path(directory)
    config = _read_json(directory / CONFIG)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise ConfigError(
            f"{directory} is quantised (quant_method {method}); give the 16-bit directory it was made from"
        )
    expected = _Layouts(None, model.moe is not None)
    with _Tensors(directory) as stored:
        stored.check(model, {param.name: expected(param) for param in model.params()})
        for param in model.params():
            tensor = stored.get(param.name)
            stored.check_finite(param.name, tensor)
            yield param.name, tensor.float()


Layout = dict[str, tuple[tuple[int, ...], Any]]  # suffix -> shape, dtype (None: any float)


class _Layouts:
    """What parts a tensor must have, found by quantising zeros of its shape: the precision alone knows."""

    def __init__(self, precision: Precision | None, moe: bool):
        self.precision, self.moe = precision, moe
        self.known: dict[tuple[int, ...], Layout] = {}

    def __call__(self, param: Param) -> Layout:
        import torch

        if self.precision is None or not self.precision.covers(param, self.moe):
            return {"weight": (param.shape, None)}
        if param.shape not in self.known:
            parts = self.precision.quantize(torch.zeros(param.shape), param.name)
            self.known[param.shape] = {suffix: (tuple(part.shape), part.dtype) for suffix, part in parts.items()}
        return self.known[param.shape]


class _Tensors:
    """The safetensors files of a directory, opened; knows which file holds which tensor."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, Any] = {}
        self.place: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Tensors:
        from safetensors import SafetensorError, safe_open

        named = self._names()
        for file, names in named.items():
            path = self.directory / file
            try:
                self.files[file] = self._stack.enter_context(safe_open(path, framework="pt"))
            except FileNotFoundError:
                raise ConfigError(f"{path} is missing, {INDEX} says that it holds {_some(names)}") from None
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path} is not a complete safetensors file ({error}); copy it again") from None
            present = set(self.files[file].keys())
            if absent := set(names) - present:
                raise ConfigError(f"{path} does not hold {_some(absent)}, {INDEX} says that it does")
            for name in present:
                if name in self.place:
                    raise ConfigError(f"{name} is in {self.place[name]} and in {file} of {self.directory}")
                self.place[name] = file
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def get(self, name: str) -> Tensor:
        return self.files[self.place[name]].get_tensor(name)

    def check(self, model: Model, expected: Mapping[str, Layout]) -> None:
        """Every part there with its shape and dtype, and nothing beside."""
        import torch

        floats = ("F32", "BF16", "F16")
        problems, seen = [], set()
        for name, layout in expected.items():
            for suffix, (shape, dtype) in layout.items():
                stored = part_name(name, suffix)
                seen.add(stored)
                if stored not in self.place:
                    problems.append(f"{stored} is missing")
                    continue
                view = self.files[self.place[stored]].get_slice(stored)
                found, kind = tuple(view.get_shape()), view.get_dtype()
                if found != shape:
                    problems.append(f"{self.place[stored]}: {stored} has shape {list(found)}, expected {list(shape)}")
                elif dtype is None and kind not in floats:
                    problems.append(f"{self.place[stored]}: {stored} is {kind}, expected one of {', '.join(floats)}")
                elif dtype is not None:
                    widened = kind == "I32" and dtype == torch.int64
                    if (got := view[0:0].dtype) != dtype and not widened:
                        problems.append(f"{self.place[stored]}: {stored} is {got}, expected {dtype}")
        for stored in sorted(set(self.place) - seen):
            if stored.endswith("rotary_emb.inv_freq"):
                continue  # a table that old exports carry; it is computed here
            if stored == "lm_head.weight" and model.tie_word_embeddings:
                if torch.equal(self.get(stored), self.get("model.embed_tokens.weight")):
                    continue
                problems.append(
                    f"{self.place[stored]}: {stored} differs from the embedding, {CONFIG} says they are tied"
                )
            else:
                problems.append(f"{self.place[stored]}: {stored} is no tensor of {model.name}")
        if problems:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            lines = "\n  ".join([*problems[:SHOWN], *more])
            raise ConfigError(f"{self.directory} does not hold the weights of {model.name}:\n  {lines}")

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """NonFiniteWeightError naming file and tensor."""
        from lpexp.precision.numeric import check_finite

        check_finite(tensor.float(), f"{self.directory / self.place[name]}: {name}")

    def _names(self) -> dict[str, list[str]]:
        """{file: the tensors that the index places in it}; for a directory of one file, no claim is made."""
        if (self.directory / INDEX).exists():
            named: dict[str, list[str]] = defaultdict(list)
            for name, file in _read_json(self.directory / INDEX).get("weight_map", {}).items():
                if Path(file).name != file:
                    raise ConfigError(f"{self.directory / INDEX} places {name} outside of its directory, in {file}")
                named[file].append(name)
            return named
        if (self.directory / SINGLE).exists():
            return {SINGLE: []}
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))
        why = (
            f"only {pickled[0]}, which would have to be unpickled; convert it to safetensors" if pickled else "neither"
        )
        raise ConfigError(f"{self.directory} has no weights: {INDEX} or {SINGLE} is needed, there is {why}")


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); a Hugging Face directory is needed") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return data


# -- headers: what a directory holds, without torch --------------------------------------------------------------------


class Header(NamedTuple):
    """One stored tensor as its file's header describes it."""

    dtype: str  # in the words of safetensors: "BF16", "F32", "I32"
    shape: tuple[int, ...]
    file: Path
    start: int  # its bytes in the file
    stop: int


def headers(directory: str | Path) -> dict[str, Header]:
    """{stored name: header} of every tensor; ConfigError names a file that is missing, cut or no safetensors."""
    directory, found = Path(directory), {}
    for file, names in _Tensors(directory)._names().items():
        path = directory / file
        try:
            held = _read_header(path)
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing, {INDEX} says that it holds {_some(names)}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a complete safetensors file ({error}); copy it again") from None
        if absent := set(names) - set(held):
            raise ConfigError(f"{path} does not hold {_some(absent)}, {INDEX} says that it does")
        found |= held
    return found


def _read_header(path: Path) -> dict[str, Header]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")  # then so many bytes of JSON, then the tensors
        if 8 + length > size:
            raise ValueError(f"{size} bytes, its header says {8 + length} or more")
        told = json.loads(file.read(length))
    begin, held = 8 + length, {}
    for name, entry in told.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            held[name] = Header(entry["dtype"], tuple(entry["shape"]), path, begin + start, begin + stop)
    if (ends := max((one.stop for one in held.values()), default=begin)) != size:
        raise ValueError(f"{size} bytes, its header says {ends}")
    return held
