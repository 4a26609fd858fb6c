"""conf/: the order of the defaults, the documented commands, and every combination of model, precision and scale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lpexp import frontend, plan
from lpexp.config import Spec
from lpexp.errors import ConfigError
from lpexp.experiment import Experiment
from lpexp.groups import CONF, choices, groups, read_choice
from lpexp.model import Model, Parallel

RECIPES = [
    ("qwen3_4b", "fp8"),
    ("qwen3_30b", "fp8"),
    ("qwen3_30b", "int4_qat"),
    ("qwen3_235b", "int4_qat"),
    ("moonlight_16b", "int4_qat"),
    ("kimi_k2_thinking", "int4_qat"),
]
PRODUCTION = ("qwen3_0_6b", "qwen3_4b", "qwen3_30b", "qwen3_235b", "moonlight_16b", "kimi_k2_thinking")


@pytest.fixture(scope="module")
def default() -> Experiment:
    return frontend.experiment()


def defaults_list() -> list[str]:
    return [str(next(iter(line))) if isinstance(line, dict) else line for line in _defaults()]


def _defaults() -> list[Any]:
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)
    return config["defaults"]


# -- order ------------------------------
def test_what_chooses_others_stands_below_what_it_chooses() -> None:
    order = defaults_list()
    assert order[0] == "_self_"
    below = [
        *(
            ("model", group)
            for group in ("cluster", "trainer", "rollout", "task", "algorithm", "correction", "precision")
        ),
        ("precision@rollout.precision", "rollout"),
        ("optional layout", "model"),
        ("experiment", "optional layout"),
        ("scale", "experiment"),
    ]
    for lower, upper in below:
        assert order.index(lower) > order.index(upper), (lower, upper)


def test_every_group_is_in_the_defaults() -> None:
    named = {line.removeprefix("optional ").removeprefix("override ").partition("@")[0] for line in defaults_list()}
    assert set(groups()) <= named


def test_no_card_sets_a_key_that_only_some_backends_have() -> None:
    """Such a key would survive a switch to a backend without it; facts belong under model.parallel."""
    for group in ("model", "layout", "experiment", "scale"):
        for name in choices(group):
            data: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"), resolve=False)
            for part in ("trainer", "rollout", "cluster"):
                for key in data.get(part, {}):
                    assert all(key in read_choice(part, choice) for choice in choices(part)), (group, name, part, key)


# -- the documented commands ------------------------------
def test_the_default_is_a_matched_run_on_this_machine(default: Experiment) -> None:
    assert (default.precision.name, default.rollout.precision, default.reference.precision.name) == (
        "bf16",
        None,
        "bf16",
    )
    assert (default.steps, default.seed, default.lag, default.cluster.name) == (100, 1, 0, "local")
    assert default.wire is default.precision


def test_a_model_alone_chooses_cluster_trainer_and_rollout() -> None:
    exp = frontend.experiment("precision=fp8", "model=qwen3_30b")
    assert (exp.cluster.name, exp.cluster.nodes) == ("h200", 2)
    assert type(exp.trainer).__name__ == "MegatronTrainerSpec"
    assert type(exp.rollout).__name__ == "SglangRolloutSpec"
    assert (exp.trainer.pp, exp.trainer.ep, exp.rollout.gpus_per_engine) == (4, 4, 8)  # type: ignore[attr-defined]


def test_what_is_typed_beats_the_card_the_layout_and_the_scale() -> None:
    exp = frontend.experiment(
        "precision=int4_qat", "model=qwen3_30b", "cluster=b200", "trainer.tp=2", "model.parallel.nodes=4"
    )
    assert (exp.cluster.name, exp.cluster.nodes, exp.trainer.tp) == ("b200", 4, 2)  # type: ignore[attr-defined]
    assert frontend.experiment("model=qwen3_4b", "scale=laptop", "task=reverse").task.name == "reverse"


def test_one_precision_can_be_mounted_on_either_side() -> None:
    for words in (["precision@rollout.precision=fp8"], ["rollout.precision=fp8"], ["experiment=fp8_rollout"]):
        exp = frontend.experiment(*words)
        assert (exp.precision.name, exp.wire.name) == ("bf16", "fp8"), words


def test_a_field_of_a_mounted_precision_can_be_typed_beside_its_name() -> None:
    exp = frontend.experiment("rollout.precision=fp8", "rollout.precision.scale_format=pow2")
    assert exp.wire.dump()["scale_format"] == "pow2"


def test_same_means_what_the_trainer_has() -> None:
    exp = frontend.experiment(
        "precision=int4_qat", "precision.group_size=32", "reference.precision=same", "rollout.precision=same"
    )
    assert exp.reference.precision == exp.precision
    assert exp.rollout.precision is None


def test_a_bare_name_in_a_file_is_a_precision_too() -> None:
    data: Any = OmegaConf.to_container(frontend.compose(), resolve=True)
    data["rollout"]["precision"] = "int4_qat"
    assert frontend.judge(data).wire.name == "int4_qat"


def test_an_emptied_mount_is_the_same_precision() -> None:
    assert frontend.experiment("experiment=fp8_rollout", "precision@rollout.precision=null").rollout.precision is None


def test_flags_may_stand_anywhere() -> None:
    assert frontend.tidy(["seed=1", "-m", "steps=1,2"]) == (["-m"], ["seed=1", "steps=1,2"])
    assert frontend.tidy(["seed=1", "--config-name", "x", "a=b", "--cfg", "job"]) == (
        ["--config-name", "x", "--cfg", "job"],
        ["seed=1", "a=b"],
    )


def test_help_shows_the_keys_that_people_change_and_each_of_them_composes(type_line: Any) -> None:
    said = type_line("--help")
    assert said.code == 0
    shown = re.findall(r"^  ([a-z_.]+=\S+)  ", said.out, re.MULTILINE)
    assert len(shown) >= 12
    assert not said.out.count("$")
    own = [word for word in shown if word.startswith(("precision.group_size", "rollout.precision"))]
    frontend.experiment(*(word for word in shown if word not in own), "algorithm.samples_per_prompt=16")
    frontend.experiment("precision=int4_qat", *own)


def test_cfg_job_prints_the_config_without_judging(type_line: Any) -> None:
    said = type_line("--cfg", "job", "steps=0")
    assert said.code == 0
    assert "steps: 0" in said.out


@pytest.mark.parametrize(("sweep", "axis"), [("group_size", "precision.group_size"), ("precision_ladder", "precision")])
def test_a_sweep_composes_on_top_of_the_config(sweep: str, axis: str, repo: Path) -> None:
    cfg = frontend.compose([], sweep, repo / "sweeps")
    text = (repo / "sweeps" / f"{sweep}.yaml").read_text()
    assert text.startswith("# ") and text.splitlines()[0].endswith("?")
    assert f"{axis}: " in text
    assert cfg.output_dir.startswith(f"outputs/{sweep}/")
    frontend.judge(cfg)


# -- every combination ------------------------------
def test_every_model_takes_every_precision_at_laptop_scale() -> None:
    base: Any = OmegaConf.to_container(frontend.compose(["scale=laptop"]), resolve=True)
    for model in choices("model"):
        card: Any = OmegaConf.to_container(frontend.compose([f"model={model}", "scale=laptop"]), resolve=True)
        for precision in choices("precision"):
            chosen = frontend.read_choice("precision", precision)
            data = {**base, "model": card["model"], "rollout": {**base["rollout"], "precision": chosen}}
            served = frontend.judge(data)
            assert (served.model.name, served.wire.name) == (model, precision)
            if served.wire.trains:
                assert frontend.judge({**base, "model": card["model"], "precision": chosen}).model.name == model


@pytest.mark.parametrize(("model", "precision"), RECIPES)
def test_each_recipe_has_a_plan_and_a_twin_of_the_same_family(model: str, precision: str) -> None:
    full = frontend.experiment(f"model={model}", f"precision={precision}")
    twin = frontend.experiment(f"model={model}", f"precision={precision}", "scale=laptop")
    assert plan.missing(full) is not None and "scale=laptop" in str(plan.missing(full))
    assert plan.missing(twin) is None
    small = twin.model.sized()
    assert (small.architecture, small.moe is None, small.mla is None) == (
        full.model.architecture,
        full.model.moe is None,
        full.model.mla is None,
    )
    assert twin.precision == full.precision
    assert twin.algorithm == full.algorithm
    assert small.num_params() < 5_000_000
    covered = {kind.kind for kind in plan.kinds(full) if kind.served == precision}
    assert covered == {kind.kind for kind in plan.kinds(twin) if kind.served == precision} != set()


def test_kimi_trains_on_the_groups_of_its_checkpoint() -> None:
    exp = frontend.experiment("model=kimi_k2_thinking", "precision=int4_qat")
    assert exp.precision.dump()["group_size"] == 32
    typed = frontend.experiment("model=kimi_k2_thinking", "precision=int4_qat", "precision.group_size=128")
    assert typed.precision.dump()["group_size"] == 128


def test_a_production_pair_without_a_layout_names_one_that_has_it() -> None:
    for model in PRODUCTION:
        for precision in ("bf16", "fp8", "int4_qat"):
            if f"{model}_{precision}" in choices("layout"):
                continue
            with pytest.raises(ConfigError, match="the nearest that has one is model="):
                frontend.experiment(f"model={model}", f"precision={precision}")


def test_every_layout_says_a_size_so_that_its_rules_are_judged() -> None:
    """A pair without a layout is known by the defaults; one whose layout says just these would be judged by nothing."""
    for name in choices("layout"):
        parallel = read_choice("layout", name)["model"]["parallel"]
        assert Parallel.model_validate(parallel) != Parallel(), name


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_is_valid_and_says_why_it_exists(name: str) -> None:
    frontend.experiment(f"experiment={name}")
    assert (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[1].startswith("# ")


@pytest.mark.parametrize("group", ["cluster", "task", "correction", "algorithm"])
def test_every_choice_of_a_small_group_is_valid(group: str) -> None:
    for name in choices(group):
        words = [f"{group}={name}"]
        if name == "prompts":
            with pytest.raises(ConfigError, match=r"task\.path: is missing"):
                frontend.experiment(*words)
        else:
            with_template = {"reasoning_gym": ["model=smollm2_135m"]}
            with_template |= dict.fromkeys(("dapo_math", "dapo_math_4k", "dapo_math_16k"), ["experiment=qwen3_4b_fp8"])
            frontend.experiment(*words, *with_template.get(name, []))


# -- the cards ------------------------------
# Published sizes in units of 1e9 (embeddings and head counted): names of the models, and Kimi-K2's report.
@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("qwen3_0_6b", 0.596),
        ("qwen3_4b", 4.02),
        ("qwen3_30b", 30.5),
        ("qwen3_235b", 235.1),
        ("moonlight_16b", 15.96),
        ("kimi_k2_thinking", 1026.4),
    ],
)
def test_a_card_has_as_many_parameters_as_its_model(model: str, billions: float) -> None:
    assert _card(model).num_params() / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("model", [name for name in choices("model") if name.endswith("_tiny")])
def test_tiny_cards_quantise_whole_blocks_and_one_is_two_deep(model: str) -> None:
    card = _card(model)
    shapes = [
        param.shape
        for param in card.params()
        if param.kind not in ("embed", "head", "norm", "bias", "router", "router_bias")
    ]
    assert card.head_dim == 64
    assert all(dim % 128 == 0 for shape in shapes for dim in shape)
    assert any(shape[1] == 256 for shape in shapes)


def _card(name: str) -> Model:
    data: Any = OmegaConf.to_container(frontend.compose([f"model={name}"]).model, resolve=True)
    return Model.model_validate(data)


# -- fields and YAML ------------------------------
def _unreachable(spec: Spec, data: Any, at: str = "") -> Iterator[str]:
    """Fields of the spec that no YAML key sets: they could not be overridden without `+`."""
    for name, field in type(spec).model_fields.items():
        key = field.alias or name
        if key not in data:
            yield f"{at}{key}"
        elif isinstance(getattr(spec, name), Spec) and isinstance(data[key], dict):
            yield from _unreachable(getattr(spec, name), data[key], f"{at}{key}.")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["precision=fp8", "rollout.precision=int4_qat", "reference.precision=fp32", "task=reverse", "correction=none"],
        ["model=kimi_k2_thinking", "precision=int4_qat", "task=add"],
    ],
    ids=["default", "mixed", "production"],
)
def test_every_field_is_a_key_of_the_config(words: list[str]) -> None:
    cfg = frontend.compose(frontend.tidy(words)[1])
    exp = frontend.judge(cfg)
    assert list(_unreachable(exp, OmegaConf.to_container(cfg, resolve=True))) == []


def test_a_field_without_a_key_would_be_found(default: Experiment) -> None:
    data = default.dump()
    del data["eval"]["show"], data["trainer"]["lr"]
    assert list(_unreachable(default, data)) == ["trainer.lr", "eval.show"]


def test_the_spec_survives_its_own_dump(default: Experiment) -> None:
    assert frontend.judge(default.dump()) == default
