"""The config of SGLang rollouts: what a server is told, what it must report, and what is refused before one starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpexp import frontend, plan
from lpexp.errors import ConfigError
from lpexp.groups import choices
from lpexp.rollout.sglang import LOCK, TESTED, SglangRolloutSpec, built
from lpexp.rollout.sglang.server import REASONS, environment, mistakes, redacted, typed


def spec(*words: str) -> tuple[SglangRolloutSpec, object]:
    exp = frontend.experiment("rollout=sglang", *words)
    assert isinstance(exp.rollout, SglangRolloutSpec)
    return exp.rollout, exp


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as told:
        frontend.experiment("rollout=sglang", *words)
    return str(told.value)


def test_one_word_serves_on_cores_where_the_cluster_has_no_gpu() -> None:
    made, exp = spec("precision=fp32")
    line = typed(made.arguments(exp, 0))
    assert "--device cpu --load-format dummy" in " ".join(line) and "--attention-backend torch_native" in " ".join(line)
    assert made.server_environment(exp)["SGLANG_USE_CPU_ENGINE"] == "1" and made.count(exp) == 1


def test_gpus_are_used_where_the_cluster_has_some_and_the_layout_says_how() -> None:
    exp = frontend.experiment("model=qwen3_30b", "precision=fp8")
    made = exp.rollout
    assert isinstance(made, SglangRolloutSpec)
    line = " ".join(typed(made.arguments(exp, 0)))
    for words in ("--device cuda", "--tp-size 8 --ep-size 8", "--quantization fp8", "--enable-memory-saver"):
        assert words in line
    assert "torch_native" not in line and "disabled" not in line and made.count(exp) == 2


@pytest.mark.parametrize("precision", choices("precision"))
def test_a_server_is_told_the_format_of_its_config_json_and_must_report_it(precision: str) -> None:
    exp = frontend.experiment(f"precision@rollout.precision={precision}", "rollout=sglang", "cluster=gpu")
    made = exp.rollout
    assert isinstance(made, SglangRolloutSpec)
    config = made.model_json(exp, 2)
    told = (config.get("quantization_config") or {}).get("quant_method")
    arguments, report = made.arguments(exp, 0), made.expected_report(exp)
    assert arguments["--quantization"] == told and report["quantization"] == (told,)
    assert arguments["--dtype"] == config["dtype"] and report["dtype"] == (config["dtype"],)
    assert config["eos_token_id"] == 2


def test_what_the_report_says_otherwise_is_named() -> None:
    made, exp = spec("precision=bf16")
    good = {name: allowed[0] for name, allowed in made.expected_report(exp).items()}  # type: ignore[arg-type]
    assert mistakes(made.expected_report(exp), good) == []  # type: ignore[arg-type]
    wrong = mistakes(made.expected_report(exp), good | {"dtype": "float16", "kv_cache_dtype": "fp8_e5m2"})  # type: ignore[arg-type]
    assert wrong == [
        "dtype is 'float16', not 'bfloat16'",
        "kv_cache_dtype is 'fp8_e5m2', not 'auto' or 'bfloat16'",
    ]


@pytest.mark.parametrize("precision", [p for p in choices("precision") if p not in ("bf16", "fp32")])
def test_a_quantised_format_is_refused_on_cores_with_the_reason(precision: str) -> None:
    said = refused(f"precision@rollout.precision={precision}")
    assert f"rollout.precision: {precision}: SGLang's kernels for {precision} need a GPU" in said
    assert "type rollout.precision=bf16" in said


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("rollout.deterministic=true", "rollout.deterministic: true needs GPUs"),
        ("rollout.gpus_per_engine=2", "rollout.gpus_per_engine: 2 needs GPUs"),
        ("rollout.kv_cache_dtype=fp8_e4m3", "rollout.kv_cache_dtype: fp8_e4m3 needs GPUs"),
        ("rollout.device=cuda", "cluster local has no GPU; type rollout.device=cpu"),
        ("rollout.args=[--dtype=half]", "rollout.args: --dtype is decided by other keys"),
        ("rollout.args=[--api-key,x]", "rollout.args: --api-key is decided by other keys"),
        ("rollout.kv_cache_dtype=int8", "should be 'auto', 'bfloat16', 'fp8_e4m3' or 'fp8_e5m2'"),
    ],
)
def test_what_a_server_on_cores_cannot_do_is_refused(word: str, says: str) -> None:
    assert says in refused("precision=fp32", word)


def test_broadcast_is_refused_where_nobody_can_send_it() -> None:
    assert "inline is one process" in refused("precision=fp32", "rollout.transport=broadcast", "cluster=inline")
    said = refused("rollout.transport=broadcast", "cluster=gpu")
    assert "NCCL takes one rank a GPU" in said
    assert spec("precision=fp32", "rollout.transport=broadcast")


def test_lag_is_refused_where_both_sides_take_turns() -> None:
    assert "lag: 1 generates while the trainer learns" in refused("lag=1", "cluster=gpu")


def test_a_variable_of_the_shell_that_changes_the_server_is_refused_and_would_not_reach_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    assert "unset SGLANG_RETURN_ORIGINAL_LOGPROB" in refused("precision=fp32")
    shell = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1", "PYTHONPATH": "ours", "PATH": "/bin"}
    assert environment(shell, {"OMP_NUM_THREADS": "1"}) == {"PATH": "/bin", "OMP_NUM_THREADS": "1"}


def test_the_canary_s_limit_is_wider_where_only_one_side_rounds() -> None:
    def limit(*words: str) -> float:
        made, exp = spec("cluster=gpu", *words)
        return made.limit(exp)  # type: ignore[arg-type]

    assert limit("precision=fp32") == pytest.approx(2e-4)
    assert limit("precision=bf16") == pytest.approx(0.02)
    assert limit("precision=fp8") == pytest.approx(0.1)
    assert limit("precision=bf16", "rollout.precision=fp8") == pytest.approx(0.2)
    assert limit("precision=bf16", "rollout.precision=int4_qat") == pytest.approx(0.22)
    assert limit("precision=int4_qat") == pytest.approx(0.02)
    assert limit("precision=bf16", "rollout.canary_limit=0.5") == 0.5


def test_the_environment_is_found_by_the_hash_of_its_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repo: Path
) -> None:
    import hashlib
    import re

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = hashlib.sha256((repo / "requirements-sglang.lock").read_bytes()).hexdigest()[:12]
    assert built() == tmp_path / "lpexp" / "envs" / f"sglang-{name}" / "bin" / "python"
    _, exp = spec("precision=fp32")
    assert str(plan.missing(exp)).endswith("type: make sglang-env")  # type: ignore[arg-type]
    (built().parents[1]).mkdir(parents=True)
    (built().parents[1] / ".installed").touch()
    assert plan.missing(exp) is None  # type: ignore[arg-type]
    assert "requirements-sglang.lock | cut -c 1-12" in (repo / "Makefile").read_text()
    assert re.search(rf"^sglang=={TESTED}$", LOCK.read_text(), re.MULTILINE)
    _, exp = spec("precision=fp32", "rollout.python=/nonexistent/python")
    assert "/nonexistent/python is no program" in str(plan.missing(exp))  # type: ignore[arg-type]


def test_a_key_is_redacted_wherever_it_stands() -> None:
    told = {"api_key": "abc123", "launch": "--api-key abc123 --port 1", "deep": [{"x": "abc123"}], "port": 1}
    assert redacted(told, "abc123") == {
        "api_key": "[key]",
        "launch": "--api-key [key] --port 1",
        "deep": [{"x": "[key]"}],
        "port": 1,
    }


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ModuleNotFoundError: No module named 'sglang'", "make sglang-env"),
        ("ImportError: libcuda.so.1: cannot open shared object file", "a library is missing"),
        ("OSError: [Errno 98] Address already in use", "the port was taken"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "not enough memory"),
        ("the program ended with signal 9", "not enough memory"),
        ("AssertionError: Fp8LinearMethod on CPU requires that CPU has AMX support", "cannot serve the format"),
        ("launch_server.py: error: unrecognized arguments: --bogus", "rollout.args"),
        ("RuntimeError: Found no NVIDIA driver on your system. No NVIDIA driver", "no GPU is visible"),
    ],
)
def test_the_first_likely_reason_of_a_failed_start_is_said(line: str, says: str) -> None:
    import re

    found = next(way for pattern, way in REASONS if re.search(pattern, line))
    assert says in found
