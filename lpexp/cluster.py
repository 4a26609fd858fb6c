"""Who sits where: the workers of a run, as Ray actors or in this process.

`Workers.spawn` gives handles; a handle's `call` gives a future. Trainer and rollout are written against these two
words only, so `cluster=inline` runs the same classes in one process. ray is imported when a Ray cluster is opened.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from lpexp.config import Spec, rule
from lpexp.errors import ConfigError, Mistake, RunError, Stopped

if TYPE_CHECKING:
    from lpexp.seats import Seat

# CUDA compute capability of the GPUs that a card may name, times ten. Source: NVIDIA's CUDA GPU tables.
CAPABILITY = {"A100": 80, "L40S": 89, "H20": 90, "H100": 90, "H200": 90, "B200": 100, "B300": 103}
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit` for the command that it runs
ADDRESS = re.compile(r"auto|(ray://)?[\w.-]+:\d{1,5}")
CONNECT_S = 10.0
OWN_WAIT_S = 30.0  # of a Ray that was just started: nobody adds GPUs to a machine
# Ray leaves CUDA_VISIBLE_DEVICES alone for workers that ask it for no GPU.
KEEP_VISIBLE = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class Cluster(Spec):
    """A machine, or many alike. `kind: inline` is this process; `ray` starts or joins a Ray cluster."""

    name: str
    kind: Literal["inline", "ray"]
    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=0)
    gpu: str | None  # a name of CAPABILITY, or any; None: CPU only
    gpu_memory_gb: float | None = Field(gt=0)  # of one GPU, 1e9 bytes; None: unknown
    interconnect: Literal["nvlink", "pcie"] | None  # between the GPUs of a node
    colocate: bool  # trainer and engines take turns on the same GPUs
    rollout_gpus: int = Field(ge=0)  # where they do not: the engines' GPUs, the last ones; the trainer has the rest
    address: str | None  # auto | HOST:PORT | ray://HOST:PORT; None: a Ray of its own, or the one whose job this is
    wait_s: float = Field(ge=0)  # for the nodes of a joined cluster
    dashboard: bool  # Ray's dashboard
    threads: int = Field(ge=1)  # OpenMP threads of each worker

    @property
    def world(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def trainer_gpus(self) -> int:
        return self.world if self.colocate else self.world - self.rollout_gpus

    @property
    def engine_gpus(self) -> int:
        return self.world if self.colocate else self.rollout_gpus

    @property
    def capability(self) -> int | None:
        """CUDA compute capability times ten; None without GPUs, or of an unknown kind."""
        return CAPABILITY.get(self.gpu or "")

    @property
    def joins(self) -> str | None:
        """The Ray cluster that this run joins; None: it starts its own."""
        return self.address or ("auto" if self.kind == "ray" and JOB in os.environ else None)

    @rule
    def _known(self) -> Iterator[Mistake]:
        if self.gpu not in (None, "any", *CAPABILITY):
            yield Mistake("gpu", f"{self.gpu!r} is not known here; use {', '.join(CAPABILITY)}, or any")
        if self.address is not None and self.kind == "inline":
            yield Mistake("address", f"{self.address}, but {self.name} starts no Ray; type cluster=local, h100 or h200")
        elif self.address is not None and not ADDRESS.fullmatch(self.address):
            yield Mistake("address", f"{self.address!r} is no address; use auto, HOST:PORT or ray://HOST:PORT")

    @rule
    def _shared_out(self) -> Iterator[Mistake]:
        if self.colocate and self.rollout_gpus:
            way = "type cluster.colocate=false to set GPUs apart, or leave it out"
            yield Mistake("rollout_gpus", f"{self.rollout_gpus}, but with colocate=true engines use every GPU; {way}")
        if not self.colocate and not 0 < self.rollout_gpus < self.world:
            of = f"of {self.world} GPUs leaves trainer or engines without any"
            way = f"use 1 to {self.world - 1}" if self.world > 1 else "use colocate=true"
            yield Mistake("rollout_gpus", f"{self.rollout_gpus} {of} (colocate=false); {way}")


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
    """Opened on a Cluster; owns every worker process of the run and closes them on every way out.

    `seats` are the run's GPUs, in the order of trainer ranks; with colocate=false the engines' are the last ones.
    """

    def __init__(
        self,
        cluster: Cluster,
        event: Callable[..., None],
        run_dir: Path,
        warn: Callable[[str, str], None] = lambda kind, message: None,
    ):
        self.cluster, self.event, self.run_dir = cluster, event, run_dir
        self.handles: list[Handle] = []
        self.seats: list[Seat] = []
        self._guardian = self._reservation = self._home = None
        # Rendezvous files, gone at close; the nodes of a joined cluster see the run's directory, not this one's /tmp.
        self.scratch = Path(tempfile.mkdtemp(prefix=".lpexp-", dir=run_dir.resolve() if cluster.joins else None))
        if cluster.kind == "ray":
            from lpexp.guardian import Guardian

            self._guardian = Guardian()
            try:
                self._open(warn)
            except BaseException:
                self.close()
                raise

    def _open(self, warn: Callable[[str, str], None]) -> None:
        cluster = self.cluster
        if cluster.joins:
            self._home = _join_ray(cluster.joins)
        else:
            _open_ray(cluster)
        if cluster.world:
            from lpexp.seats import Reservation

            wait_s = cluster.wait_s if cluster.joins else OWN_WAIT_S
            self._reservation = Reservation(
                cluster.nodes, cluster.gpus_per_node, cluster.gpu, wait_s, lambda text: warn("waiting", text)
            )
            self.seats = self._reservation.seats

    def spawn(
        self,
        name: str,
        kind: Callable[..., Any],
        *args: Any,
        env: dict[str, str] | None = None,
        seats: Sequence[Seat] = (),
    ) -> Handle:
        """A worker that holds `kind(*args)`; `env` is set before it starts.

        It sees the GPUs of its `seats`, all on one node, and sits there; without any it sees the first node's.
        """
        if self.cluster.kind == "inline":
            handle: Handle = _InlineHandle(name, kind, args, env or {})
        else:
            handle = _RayHandle(name, kind, args, self._environment(env or {}, seats), self._where(seats))
        self.handles = [*(h for h in self.handles if h.name != name), handle]  # a successor takes the name
        return handle

    def _where(self, seats: Sequence[Seat]) -> Any:
        """How Ray is told where a worker goes; None: there is one place only."""
        if self._reservation is not None:
            return self._reservation.strategy(seats[0].node if seats else 0)
        return self._home

    def _environment(self, env: dict[str, str], seats: Sequence[Seat]) -> dict[str, str]:
        if not self.seats:
            return env
        mine = seats or [seat for seat in self.seats if seat.node == 0]
        assert len({seat.node for seat in mine}) == 1, "a worker sits on one node"
        return {**env, "CUDA_VISIBLE_DEVICES": ",".join(seat.gpu for seat in mine), **KEEP_VISIBLE}

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

            if self._reservation is not None and ray.is_initialized():
                self._reservation.release()
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
    def __init__(self, name: str, kind: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str]):
        os.environ.update(env)
        self.name, self._held = name, kind(*args)

    def call(self, method: str, *args: Any) -> Future:
        try:
            return _Done(os.getpid() if method == "pid" else getattr(self._held, method)(*args))
        except Exception as error:
            return _Done(None, error)

    def stop(self) -> None:
        if close := getattr(self._held, "close", None):  # an actor's process ends, and with it what it started
            close()
        self._held = None


class _RayFuture:
    """A call to an actor; the answer is fetched once."""

    def __init__(self, name: str, ref: Any):
        self.name = name
        self._ref: Any = ref
        self._settled: _Done | None = None

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
    def __init__(
        self, name: str, kind: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], where: Any = None
    ):
        import ray

        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
        if env:
            options["runtime_env"] = {"env_vars": env}
        if where is not None:
            options["scheduling_strategy"] = where
        self.name = name
        self._actor = ray.remote(**options)(_Worker).remote(kind, args)

    def call(self, method: str, *args: Any) -> Future:
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

    def __init__(self, kind: Callable[..., Any], args: tuple[Any, ...]):
        self._held = kind(*args)
        gc.collect()
        gc.freeze()  # what lives as long as the worker is not searched again and again

    def call(self, method: str, *args: bytes) -> bytes:
        answer = os.getpid() if method == "pid" else getattr(self._held, method)(*map(pickle.loads, args))
        return pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)  # in one piece: Ray handles each array of an answer singly

    def call_two(self, method: str, *args: Any) -> tuple[bytes, bytes]:
        bulk, report = getattr(self._held, method)(*args)
        return pickle.dumps(bulk, pickle.HIGHEST_PROTOCOL), pickle.dumps(report, pickle.HIGHEST_PROTOCOL)


def _open_ray(cluster: Cluster) -> None:
    """A Ray instance of our own that listens on loopback only.

    Ray takes 127.0.0.1 for its node address, and binds every server to it, only where it believes that clusters are
    not supported; the variable says so. It is read when ray is imported.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.update(KEEP_VISIBLE)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=1,  # actors ask for none; more would only start idle workers
        include_dashboard=cluster.dashboard,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _join_ray(address: str) -> Any:
    """Connect to a Ray cluster; where workers without GPUs go: the driver's node, or the head of a ray:// address."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = address.removeprefix("ray://")
    way = "start one (ray start --head), mend cluster.address, or leave it out for a Ray of this run's own"
    if place != "auto":
        host, _, port = place.rpartition(":")
        try:
            socket.create_connection((host, int(port)), CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise ConfigError([Mistake("cluster.address", f"nothing answers at {place} ({error}); {way}")]) from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:  # no cluster, another Ray or Python than ours
        raise ConfigError([Mistake("cluster.address", f"{address}: {_first_line(error)}; {way}")]) from None
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _first_line(error: BaseException) -> str:
    """The line that says most: of a failed start the last one, which holds the cause."""
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line).strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "creation task" in lines[0] else lines[0]
