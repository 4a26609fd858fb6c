"""Hugging Face directories: config.json and safetensors, read and written, plain or quantised by a Precision.

A served directory holds, for each tensor `X.weight`, the parts that its precision makes of it under `X.<suffix>`, and
the precision's `quantization_config`. What is read is checked against `Model.params()`: every tensor there, none
beside, shapes and dtypes as expected, all finite. One tensor is in memory at a time while writing. Only safetensors
(shards.py) are read: a pickled .bin is refused. From directory to directory: lpexp/convert.py.
Left out: tokenizers (tokenizer.py), multi-token-prediction layers, biases other than those of q, k and v.
Source: the configuration classes of transformers 5.17; older ones read the same file (rope_theta, rope_scaling).
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpexp.data import Param
from lpexp.disk import sync, sync_tree, write_json
from lpexp.errors import ConfigError, RunError
from lpexp.model import Mla, Model, Moe, RopeScaling, shards
from lpexp.model.shards import INDEX, SINGLE, part_name
from lpexp.precision import Parts, Precision, expected, from_hf, side

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
CONFIG = "config.json"
DECODED = "lpexp_decoded_from"  # in a 16-bit config.json: the quantization_config that its values were decoded from
ROWS_BYTES = 1 << 22
SHOWN = 8  # problems listed of one directory
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")  # endings of files that are not copied


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
    tensors: Iterable[tuple[str, Tensor | Parts]],
    precision: Precision,
    shard_bytes: int = shards.SHARD_BYTES,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a directory that serves `model` in `precision`; it appears whole or not at all.

    `tensors` gives every tensor of `model.params()` once, in any order, or its parts where they are made already;
    NonFiniteWeightError names one with a NaN. A shard is at most `shard_bytes`, or one tensor's parts where those are
    more. `config` is the config.json to keep; without it the model's own is written.
    """
    directory = Path(directory)
    judge_new(directory)
    params, moe = list(model.params()), model.moe is not None
    config = served_config(config_json(model) if config is None else config, params, moe, precision)
    made = plan(params, moe, precision, shard_bytes)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temp = directory.with_name(f".tmp-{directory.name}-{os.getpid()}")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    try:
        shards.create(temp, made)
        waiting = {param.name: param for param in params}
        for name, tensor in tensors:
            param = waiting.pop(name, None)
            if param is None:
                raise RunError(f"{name} is no tensor of this model, or came twice")
            if not isinstance(tensor, dict) and tuple(tensor.shape) != param.shape:
                raise RunError(f"{name} has shape {list(tensor.shape)}, the model's is {list(param.shape)}")
            made_of = tensor if isinstance(tensor, dict) else side(param, precision, moe).quantize(tensor, name)
            for suffix, part in made_of.items():
                shards.write(temp, made.places[part_name(name, suffix)], part)
        if waiting:
            raise RunError(f"{len(waiting)} tensors of the model did not come: {_some(waiting)}")
        publish(temp, directory, made, config, beside(model.path) if model.path else [])
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    return directory


def judge_new(directory: Path) -> None:
    """ConfigError where something is in the way of a new directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists already; remove it or choose another directory")


def plan(params: list[Param], moe: bool, precision: Precision, shard_bytes: int = shards.SHARD_BYTES) -> shards.Plan:
    """Where each part of each tensor goes: the same for whoever writes this model in this precision."""
    layouts = ((param.name, expected(side(param, precision, moe), param.shape)) for param in params)
    return shards.plan(layouts, shard_bytes)


def served_config(config: Mapping[str, Any], params: list[Param], moe: bool, precision: Precision) -> dict[str, Any]:
    """A config.json that says how `precision` serves these tensors."""
    # The dtype of what is left unquantised, which is also that of the activations.
    dtype = expected(precision.plain, (1, 1))["weight"][1]
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", DECODED)}
    quantization = precision.hf(params, moe)
    told = {} if quantization is None else {"quantization_config": quantization}
    return kept | {"dtype": dtype, "torch_dtype": dtype} | told


def beside(directory: str | Path) -> list[Path]:
    """Files that travel with a model as they are: tokenizer, chat template, its own code."""
    found = sorted(path for path in Path(directory).iterdir() if path.is_file())
    return [p for p in found if not p.name.startswith(".") and p.name != CONFIG and not p.name.endswith(WEIGHTS)]


def publish(temp: Path, directory: Path, made: shards.Plan, config: dict[str, Any], files: Iterable[Path]) -> None:
    """Index, config and the files beside them; then all of it is on disk, and only then has its name."""
    shards.write_index(temp, made)
    write_json(temp / CONFIG, config)
    for path in files:
        shutil.copyfile(path, temp / path.name)
    sync_tree(temp)
    temp.rename(directory)
    sync(directory.parent)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json as it stands; ConfigError where it cannot be read."""
    return _read_json(Path(directory) / CONFIG)


def read_model(directory: str | Path) -> Model:
    """The Model that a directory's config.json describes, with `path` set to it."""
    directory = Path(directory)
    return model_from_config(read_config(directory), directory.name, str(directory))


def read_precision(directory: str | Path, model: Model) -> Precision | None:
    """The precision of a served directory; None when it is not quantised, ConfigError when nobody reads it."""
    directory = Path(directory)
    quantization = read_config(directory).get("quantization_config")
    try:
        return from_hf(quantization, model.params(), model.moe is not None) if quantization else None
    except ConfigError as error:
        raise ConfigError(f"{directory / CONFIG}: {'; '.join(m.message for m in error.mistakes)}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{directory / CONFIG}: quantization_config cannot be read: {error!r}") from None


def load(directory: str | Path) -> tuple[Model, Precision | None, dict[str, Parts]]:
    """A served directory as its model, its precision (None when it is not quantised) and {tensor name: parts}.

    ConfigError lists every missing, unexpected or misshapen tensor with its file. Parts are what is stored, bit
    for bit, but for int32 where the precision has int64, which is widened.
    """
    directory = Path(directory)
    model = read_model(directory)
    precision = read_precision(directory, model)
    stored = Stored(directory, model, precision)
    weights = {param.name: stored.parts(param) for param in model.params()}
    for param in model.params():
        for suffix, part in weights[param.name].items():
            if part.is_floating_point():
                stored.check_finite(part_name(param.name, suffix), part)
    return model, precision, weights


def load_weights(directory: str | Path, model: Model) -> dict[str, Tensor]:
    """{name: float32 tensor} of an unquantised directory (bf16, fp16 or fp32), for exactly the tensors of `model`."""
    return dict(read_weights(directory, model))


def read_weights(
    directory: str | Path, model: Model, only: Container[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """As `load_weights`, one tensor at a time in the model's order, or `only` some of them. ConfigError names file
    and tensor.
    """
    directory = Path(directory)
    method = (read_config(directory).get("quantization_config") or {}).get("quant_method")
    if method:
        raise ConfigError(
            f"{directory} is quantised (quant_method {method}); give the 16-bit directory it was made from, "
            f"or take it back to 16 bits with `lpexp convert bf16`"
        )
    stored = Stored(directory, model, None)
    for param in model.params():
        if only is None or param.name in only:
            tensor = stored.parts(param)["weight"]
            stored.check_finite(param.name, tensor)
            yield param.name, tensor.float()


class Stored:
    """The tensors of a directory, found and checked: every part there with its shape and dtype, and none beside.

    ConfigError lists all that is wrong. Only headers are read until `parts` is asked.
    """

    def __init__(self, directory: Path, model: Model, precision: Precision | None):
        self.directory, self.model, self.precision = directory, model, precision
        self.moe = model.moe is not None
        self.place: dict[str, shards.Entry] = {}
        for file, names in self._names().items():
            self._open(directory / file, names)
        self._check()

    def layout(self, param: Param) -> dict[str, tuple[tuple[int, ...], str | None]]:
        """suffix -> shape and dtype (None: any float) of what must be there."""
        if self.precision is None or not self.precision.covers(param, self.moe):
            return {"weight": (param.shape, None)}
        return dict(expected(self.precision, param.shape))

    def parts(self, param: Param, first: int = 0, last: int | None = None) -> Parts:
        """A tensor's parts; or those of its rows first..last, which start and end where the precision's rows do."""
        import torch

        rows = slice(first, param.shape[0] if last is None else last)
        whole = rows == slice(0, param.shape[0])
        layout = self.layout(param)
        fixed = {} if self.precision is None or len(layout) == 1 else self.precision.fixed(param.shape)
        found = {}
        for suffix, (shape, dtype) in layout.items():
            entry = self.place[part_name(param.name, suffix)]
            if whole:
                part = shards.read(self.directory, entry)
            elif suffix in fixed:
                assert self.precision is not None
                part = self.precision.fixed((rows.stop - rows.start, *param.shape[1:]))[suffix]
            else:
                step = -(-param.shape[0] // shape[0])  # rows of the tensor to one of the part
                part = shards.read(self.directory, entry, rows.start // step, -(-rows.stop // step))
            found[suffix] = part if dtype is None else part.to(getattr(torch, dtype))
            if whole and suffix in fixed and not torch.equal(found[suffix], fixed[suffix]):
                told = found[suffix].tolist()
                raise ConfigError(f"{self.where(param.name, suffix)} says {told}, the tensor is {list(param.shape)}")
        return found

    def where(self, name: str, suffix: str = "weight") -> str:
        """File and tensor, for messages."""
        stored = part_name(name, suffix)
        return f"{self.directory / self.place[stored].file}: {stored}"

    def check_finite(self, stored: str, tensor: Tensor) -> None:
        """NonFiniteWeightError naming file and tensor."""
        from lpexp.precision.numeric import check_finite

        check_finite(tensor.float(), f"{self.directory / self.place[stored].file}: {stored}")

    def _open(self, path: Path, names: list[str]) -> None:
        try:
            held = shards.read_header(path)
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing, {INDEX} says that it holds {_some(names)}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a complete safetensors file ({error}); copy it again") from None
        if absent := set(names) - set(held):
            raise ConfigError(f"{path} does not hold {_some(absent)}, {INDEX} says that it does")
        for name, entry in held.items():
            if name in self.place:
                raise ConfigError(f"{name} is in {self.place[name].file} and in {path.name} of {self.directory}")
            self.place[name] = entry

    def _check(self) -> None:
        floats = ("float32", "bfloat16", "float16")
        problems, seen = [], set()
        for param in self.model.params():
            for suffix, (shape, dtype) in self.layout(param).items():
                stored = part_name(param.name, suffix)
                seen.add(stored)
                entry = self.place.get(stored)
                if entry is None:
                    problems.append(f"{stored} is missing")
                    continue
                widened = (entry.dtype, dtype) == ("int32", "int64")
                if entry.shape != shape:
                    problems.append(f"{entry.file}: {stored} has shape {list(entry.shape)}, expected {list(shape)}")
                elif dtype is None and entry.dtype not in floats:
                    problems.append(f"{entry.file}: {stored} is {entry.dtype}, expected {', '.join(floats)}")
                elif dtype is not None and entry.dtype != dtype and not widened:
                    problems.append(f"{entry.file}: {stored} is {entry.dtype}, expected {dtype}")
        for stored in sorted(set(self.place) - seen):
            file = self.place[stored].file
            if stored.endswith("rotary_emb.inv_freq"):
                continue  # a table that old exports carry; it is computed here
            if stored == "lm_head.weight" and self.model.tie_word_embeddings:
                if not self._equal(stored, "model.embed_tokens.weight"):
                    problems.append(f"{file}: {stored} differs from the embedding, {CONFIG} says they are tied")
            else:
                problems.append(f"{file}: {stored} is no tensor of {self.model.name}")
        if problems:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            lines = "\n  ".join([*problems[:SHOWN], *more])
            raise ConfigError(f"{self.directory} does not hold the weights of {self.model.name}:\n  {lines}")

    def _equal(self, a: str, b: str) -> bool:
        """Are two stored tensors the same values? A few rows are read at a time."""
        import torch

        one, other = self.place[a], self.place.get(b)
        if other is None or one.shape != other.shape:
            return False
        step = max(1, ROWS_BYTES // one.row_bytes)
        return all(
            torch.equal(*(shards.read(self.directory, e, r, min(r + step, e.shape[0])) for e in (one, other)))
            for r in range(0, one.shape[0], step)
        )

    def _names(self) -> dict[str, list[str]]:
        """{file: the tensors that the index places in it}; for a directory of one file, no claim is made."""
        if (self.directory / INDEX).exists():
            named: dict[str, list[str]] = defaultdict(list)
            weight_map = _read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConfigError(f"{self.directory / INDEX} has no weight_map; write the index again")
            for name, file in weight_map.items():
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
