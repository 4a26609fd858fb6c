"""Who sits where: the workers of a run, as Ray actors or in this process.

`Workers.spawn` gives handles; a handle's `call` gives a future. Trainer and rollout are written against these two
words only, so `cluster=inline` runs the same classes in one process. ray is imported when a Ray cluster is opened.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from lpexp.config import Spec
from lpexp.errors import ConfigError, RunError, Stopped

SHARED = "LPEXP_RAY_ADDRESS"  # set by a sweep for its runs: the Ray instance that they share


class Cluster(Spec):
    """A machine, or many alike. `kind: inline` is this process; `ray` starts or joins a Ray cluster."""

    name: str
    kind: Literal["inline", "ray"]
    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=0)
    gpu: str | None  # "H100", "H200", "B200"; None: CPU only
    gpu_memory_gb: float | None
    dashboard: bool  # Ray's dashboard
    threads: int = Field(ge=1)  # OpenMP threads of each worker


class Future(Protocol):
    """The answer of a call that may still be running."""

    def result(self) -> Any:
        """Wait; raises what the worker raised, RunError when the worker died."""
        ...

    def died(self) -> bool:
        """Wait; True when the worker process is gone (its own exceptions are not deaths)."""
        ...

    def error(self) -> BaseException | None: ...


class Handle(Protocol):
    """One worker."""

    name: str

    def call(self, method: str, *args: Any) -> Future: ...

    def stop(self) -> None: ...


class Workers:
    """Opened on a Cluster; owns every worker process of the run and closes them on every way out."""

    def __init__(self, cluster: Cluster, event: Callable[..., None], run_dir: Path):
        self.cluster, self.event, self.run_dir = cluster, event, run_dir
        self.handles: list[Handle] = []
        self.scratch = Path(tempfile.mkdtemp(prefix="lpexp-"))  # rendezvous files; gone at close
        self._guardian = None
        self._asked: dict[str, _RayFuture] = {}  # each Ray worker's process id, once it has started
        if cluster.kind == "ray":
            from lpexp.guardian import Guardian

            self._guardian = Guardian()
            _open_ray(cluster, os.environ.get(SHARED))

    def spawn(self, name: str, kind: type, *args: Any, env: dict[str, str] | None = None) -> Handle:
        """A worker that holds `kind(*args)`; `env` is set before it starts."""
        make = _RayHandle if self.cluster.kind == "ray" else _InlineHandle
        handle = make(name, kind, args, env or {})
        self.handles = [*(h for h in self.handles if h.name != name), handle]  # a successor takes the name
        if isinstance(handle, _RayHandle):
            self._asked[name] = handle.call("pid")
        return handle

    def started(self) -> list[int]:
        """Process ids of the workers that have started; waits for none. In this process there are none."""
        return [future.result() for future in self._asked.values() if future.ready() and future.error() is None]

    def pids(self) -> dict[str, int]:
        """The process of each worker; waits until all have started."""
        return {name: future.result() for name, future in [(h.name, h.call("pid")) for h in self.handles]}

    def share(self, handle: Handle, method: str, *args: Any) -> tuple[Any, Future]:
        """Call a method that answers (bulk, report): the bulk stays with the workers, the report comes here."""
        if isinstance(handle, _RayHandle):
            return handle.call_two(method, *args)
        bulk, report = handle.call(method, *args).result()
        return bulk, _Done(report)

    def close(self) -> None:
        if self.cluster.kind == "ray":
            import ray

            ray.shutdown()
        if self._guardian is not None:
            self._guardian.release()
        self.handles.clear()
        shutil.rmtree(self.scratch)


class _Done:
    """The future of a call made in this process."""

    def __init__(self, value: Any, error: BaseException | None = None):
        self._value, self._error = value, error

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value

    def died(self) -> bool:
        return False

    def error(self) -> BaseException | None:
        return self._error


class _InlineHandle:
    def __init__(self, name: str, kind: type, args: tuple[Any, ...], env: dict[str, str]):
        os.environ.update(env)
        self.name, self._held = name, kind(*args)

    def call(self, method: str, *args: Any) -> Future:
        try:
            return _Done(os.getpid() if method == "pid" else getattr(self._held, method)(*args))
        except Exception as error:
            return _Done(None, error)

    def stop(self) -> None:
        self._held = None


class _RayFuture:
    """A call to an actor; the answer is fetched once."""

    def __init__(self, name: str, ref: Any):
        self.name = name
        self._ref: Any = ref
        self._settled: _Done | None = None

    def ready(self) -> bool:
        """Is there an answer?"""
        import ray

        return self._settled is not None or bool(ray.wait([self._ref], timeout=0)[0])

    def _wait(self) -> _Done:
        import ray

        if self._settled is None:
            try:
                while not ray.wait([self._ref], timeout=0.5)[0]:
                    pass  # short waits, so that a signal is handled between them
                self._settled = _Done(pickle.loads(ray.get(self._ref)))  # from our own worker, over loopback
            except SystemError as error:  # a stop that was raised while Ray was about to return
                if isinstance(error.__cause__, Stopped):
                    raise error.__cause__ from None
                raise
            except Exception as error:
                self._settled = _Done(None, error)
            self._ref = None
        return self._settled

    def error(self) -> BaseException | None:
        return self._wait().error()

    def died(self) -> bool:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, WorkerCrashedError

        return isinstance(self.error(), ActorDiedError | ActorUnavailableError | WorkerCrashedError)

    def result(self) -> Any:
        from ray.exceptions import RayTaskError

        error = self.error()
        if error is not None and self.died():
            raise RunError(f"worker {self.name} died: {_first_line(error)}") from error
        if isinstance(error, RayTaskError) and isinstance(error.cause, RunError | ConfigError):
            raise error.cause from None
        return self._wait().result()


class _RayHandle:
    def __init__(self, name: str, kind: type, args: tuple[Any, ...], env: dict[str, str]):
        import ray

        # In a shared instance a worker is no child of ours: it gets the cards that this run was given.
        if SHARED in os.environ and "CUDA_VISIBLE_DEVICES" in os.environ:
            env = {"CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"], **env}
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
        if env:
            options["runtime_env"] = {"env_vars": env}
        self.name = name
        self._actor = ray.remote(**options)(_Worker).remote(kind, args)

    def call(self, method: str, *args: Any) -> _RayFuture:
        import ray

        # In one piece each: Ray handles every array of an argument singly. Another worker's bulk is passed on unseen.
        packed = [arg if isinstance(arg, ray.ObjectRef) else pickle.dumps(arg, pickle.HIGHEST_PROTOCOL) for arg in args]
        return _RayFuture(self.name, self._actor.call.remote(method, *packed))

    def call_two(self, method: str, *args: Any) -> tuple[Any, Future]:
        """The references of a pair's halves; the first is passed on unseen, and kept alive by whoever holds it."""
        first, second = self._actor.call_two.options(num_returns=2).remote(method, *args)
        return first, _RayFuture(self.name, second)

    def stop(self) -> None:
        import ray

        ray.kill(self._actor)  # type: ignore[arg-type]


class _Worker:
    """The actor: one object of ours and its methods by name."""

    def __init__(self, kind: type, args: tuple[Any, ...]):
        self._held = kind(*args)
        gc.collect()
        gc.freeze()  # what lives as long as the worker is not searched again and again

    def call(self, method: str, *args: bytes) -> bytes:
        answer = os.getpid() if method == "pid" else getattr(self._held, method)(*map(pickle.loads, args))
        return pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)  # in one piece: Ray handles each array of an answer singly

    def call_two(self, method: str, *args: Any) -> tuple[bytes, bytes]:
        bulk, report = getattr(self._held, method)(*args)
        return pickle.dumps(bulk, pickle.HIGHEST_PROTOCOL), pickle.dumps(report, pickle.HIGHEST_PROTOCOL)


@contextlib.contextmanager
def shared(cluster: Cluster) -> Iterator[dict[str, str]]:
    """A Ray instance for several runs: the environment that makes their processes join it. Gone at the end."""
    _open_ray(cluster, None)
    import ray

    try:
        yield {SHARED: ray.get_runtime_context().gcs_address}
    finally:
        ray.shutdown()


def _open_ray(cluster: Cluster, address: str | None) -> None:
    """A Ray instance of our own that listens on loopback only, or the one at `address`, which is such a one.

    Ray takes 127.0.0.1 for its node address, and binds every server to it, only where it believes that clusters are
    not supported; the variable says so. It is read when ray is imported.
    """
    import logging

    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    # Actors ask for no CPU; more would only start idle workers.
    own: dict[str, Any] = {"num_cpus": 1, "include_dashboard": cluster.dashboard}
    ray.init(
        address=address or "local",
        log_to_driver=False,
        logging_level=logging.ERROR,
        **({} if address else own),
    )


def _first_line(error: BaseException) -> str:
    """The line that says most: of a failed start the last one, which holds the cause."""
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line).strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "creation task" in lines[0] else lines[0]
