"""`hyperflexis serve`: checks a fleet, builds its children's command lines, and keeps a person informed.

Here the values of the fleet file become those of the parts: what each child is told is built in this module and
nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import assert_never

from . import __version__, preflight, wire
from .config import EmulatedArgs, Fleet, Model, OpenAIArgs, Section, TorchArgs, VllmArgs, read_api_keys
from .controller import ControllerConfig
from .core.effects import Launch
from .core.events import GatewayJoined
from .core.launch import Means
from .core.links import BYTES_PER_S, Split
from .core.slo import Slo, SloClass
from .core.weights import WeightSource
from .engines.profiles import load_profile
from .engines.torch.config import load_config
from .errors import ConfigError, HyperFlexisError
from .gateway.config import GatewayConfig, Limits, Tenant
from .host_copy import CopyConfig
from .launch.local import instance_command, own_command, start_process
from .launch.static import endpoint_command
from .policy.catalog import find_policy
from .policy.scale import ModelScale, ScaleConfig
from .runtime.launcher import Launcher, launch_for
from .runtime.server import ServerConfig
from .runtime.state import Lock, RunningChild, StateFile, socket_dir
from .runtime.supervisor import Child, Supervisor, observe_fleet

READY_POLL_S = 0.05
WAIT_NOTICE_S = 15.0


def fleet_file(state_dir: Path) -> Path:
    """The resolved fleet, as the children read it."""
    return state_dir / "fleet.json"


def load_resolved(state_dir: Path) -> Fleet:
    """The fleet that ``serve`` resolved. Raises HyperFlexisError when none is there."""
    try:
        return Fleet.model_validate_json(fleet_file(state_dir).read_bytes())
    except FileNotFoundError as error:
        raise HyperFlexisError(f"{state_dir} has no fleet.json: it is written by hyperflexis serve") from error


def controller_address(state_dir: Path) -> str:
    """Where the fleet's controller listens."""
    return f"unix:{socket_dir(state_dir) / 'controller.sock'}"


START_S: dict[Means, float] = {"disk": 10.0, "d2d": 8.0, "standby": 1.0}
"""What starts are expected to take until one was measured, where no profile says it: those of a model of 1 GiB."""
PROCESS_S = 2.0
"""The process of an emulated instance is a real one."""


def server_config(fleet: Fleet, state_dir: Path, term: int) -> tuple[ServerConfig, ControllerConfig]:
    """What the controller's process is told."""
    sizes = [model.num_instances for model in fleet.models.values()]
    held = {name: _status(model) for name, model in fleet.models.items() if model.instances.scaled}
    server = ServerConfig(controller_address(state_dir), term, state_dir / "journal", fleet.digest(), sum(sizes), held)
    controller = ControllerConfig(
        models=tuple(fleet.models),
        policy=fleet.policy,
        observe=fleet.observe,
        max_backlog_s=fleet.limits.max_backlog_s,
        # Of the largest model: in a smaller one there are fewer left to decode.
        split=Split.of(max(sizes), fleet.prefill, fleet.static_roles) if fleet.disaggregated else None,
        scale=_scale_config(fleet, state_dir),
    )
    return server, controller


def _scale_config(fleet: Fleet, state_dir: Path) -> ScaleConfig | None:
    """None where all models have a fixed number of instances."""
    scaled = {name: model for name, model in fleet.models.items() if model.instances.scaled}
    if not scaled:
        return None
    devices = None
    if fleet.devices is not None:
        others = [model for name, model in fleet.models.items() if name not in scaled and model.endpoints is None]
        fixed = sum(model.num_instances for model in others)
        devices = sum(device.count for device in fleet.devices) - fixed
    models = [
        ModelScale(
            name,
            model.instances.min,
            model.instances.most,
            model.instances.standby,
            max(one.target for one in fleet.classes),
            start_s=_start_s(model),
            latency=None if model.profile is None else load_profile(model.profile).coefficients,
            copy=copy_of(state_dir, name) if model.host_copy else None,
        )
        for name, model in scaled.items()
    ]
    return ScaleConfig(tuple(models), devices, fleet.scaler)


def _start_s(model: Model) -> dict[Means, float]:
    """Seconds of a start by the means that there are, until one was measured."""
    args = model.engine_args()
    profile = None if model.profile is None else load_profile(model.profile)
    if isinstance(args, EmulatedArgs):
        assert profile is not None
        start, scale = profile.start, args.start_scale
        if start is None or not scale:
            return {"disk": PROCESS_S, "standby": 0.0}
        before_s = PROCESS_S + scale * (start.engine_init_s + start.warm_up_s)
        link_s = scale * profile.weight_bytes / BYTES_PER_S
        return {"disk": before_s + scale * start.weights_s, "d2d": before_s + link_s, "standby": link_s}
    if not _gives_weights(model):
        return {"disk": START_S["disk"], "standby": START_S["standby"]}
    return START_S


def _status(model: Model) -> wire.ModelStatus:
    """What gateways can tell clients before there is an instance: a prompt may have so many tokens at most."""
    args = model.engine_args()
    if isinstance(args, EmulatedArgs):
        assert model.profile is not None
        context = args.context_length or load_profile(model.profile).context_length
    else:
        assert isinstance(args, TorchArgs) and model.path is not None
        own = load_config(Path(model.path)).context_length
        context = min(own, args.context_length or own, args.kv_tokens or own)
    return wire.ModelStatus([], context, returns_token_ids=True, holds=True)


def _gives_weights(model: Model) -> bool:
    """Whether instances give their weights to others: those in the host's memory. A device's have not been run."""
    args = model.engine_args()
    return isinstance(args, TorchArgs) and args.device == "cpu"


def gateway_config(fleet: Fleet, state_dir: Path, index: int) -> GatewayConfig:
    """What one gateway's process is told."""
    host, port = fleet.host_port
    limits = fleet.limits
    tenants = []
    for name, tenant in fleet.tenants.items():
        allowed = None if tenant.allowed_classes is None else frozenset(tenant.allowed_classes)
        floor = _slo(tenant.floor.ttft_ms, tenant.floor.tpot_ms, tenant.floor.e2e_ms)
        tenants.append(Tenant(name, tenant.weight, tenant.default_class, allowed, floor))
    keys = read_api_keys(Path(fleet.api_keys_file)) if fleet.api_keys_file is not None else {}
    # A tenant of the key file that the fleet file does not mention has no restrictions.
    tenants += [Tenant(name) for name in sorted(set(keys.values()) - set(fleet.tenants))]
    return GatewayConfig(
        id=f"gateway-{index}",
        controller=controller_address(state_dir),
        models={name: _tokenizer(model) for name, model in fleet.models.items()},
        host=host,
        port=port,
        classes=tuple(
            SloClass(c.name, _slo(c.ttft_ms, c.tpot_ms, c.e2e_ms), c.priority, c.target) for c in fleet.classes
        ),
        default_class=fleet.default_class or fleet.classes[0].name,
        service_tiers=fleet.tiers,
        tenants=tuple(tenants),
        api_keys=keys,
        reuse_port=fleet.gateways > 1,
        limits=Limits(
            max_body_bytes=int(limits.max_body_mb * (1 << 20)),
            max_open_requests=limits.max_open_requests,
            max_waiting_requests=limits.max_waiting_requests,
            max_connections=limits.max_connections,
            request_timeout_s=limits.request_timeout_s,
            idle_timeout_s=limits.idle_timeout_s,
            stall_timeout_s=limits.stall_timeout_s,
            shutdown_grace_s=limits.shutdown_grace_s,
            resume_wait_s=limits.resume_wait_s,
            start_wait_s=limits.start_wait_s,
        ),
    )


def _tokenizer(model: Model) -> Path | None:
    args = model.engine_args()
    takes_text = isinstance(args, OpenAIArgs) and not args.token_ids
    return None if model.path is None or takes_text else Path(model.path)


def _slo(ttft_ms: float | None, tpot_ms: float | None, e2e_ms: float | None) -> Slo:
    ttft_s, tpot_s, e2e_s = (None if ms is None else ms / 1e3 for ms in (ttft_ms, tpot_ms, e2e_ms))
    return Slo(ttft_s, tpot_s, e2e_s)


def instance_id(model: str, index: int) -> str:
    """The name of a model's instance among the fleet's processes."""
    return f"{model.replace('/', '-')}-{index}"


COPY_EPOCH = 0
"""There are no other weights at a copy's address than those of the checkpoint, however often its process began."""


def copy_of(state_dir: Path, model: str) -> WeightSource:
    """Where the copy of a model's weights is to be had, and its name among the fleet's processes."""
    key = hashlib.blake2b(model.encode(), digest_size=5).hexdigest()
    address = f"unix:{socket_dir(state_dir) / f'c-{key}.sock'}"
    return WeightSource(address, f"{model.replace('/', '-')}-copy", COPY_EPOCH)


def copy_config(fleet: Fleet, state_dir: Path, name: str) -> CopyConfig:
    """What the process of a model's copy is told."""
    model = fleet.models[name]
    args = model.engine_args()
    assert isinstance(args, TorchArgs) and model.path is not None
    return CopyConfig(copy_of(state_dir, name), Path(model.path), args.dtype)


def started_with(fleet: Fleet) -> dict[str, str]:
    """What tells children that this fleet would start from others, by its name in words."""
    keys = Path(fleet.api_keys_file).read_bytes() if fleet.api_keys_file is not None else b""
    return {
        "the release": __version__,
        "the fleet file": fleet.digest(),
        "the key file": hashlib.blake2b(keys, digest_size=8).hexdigest(),
    }


def children(fleet: Fleet, state_dir: Path) -> list[Child]:
    """All processes of the fleet but those that are launched and stopped by need. Raises ConfigError when two would
    have one name."""
    found = [Child("controller", "controller", lambda term: own_command("_controller", str(state_dir), str(term)), {})]
    gpu = 0
    for name, model in fleet.models.items():
        args = model.engine_args()
        gpus = (args.gpus or 0) if isinstance(args, VllmArgs) else 0
        for index in range(0 if model.instances.scaled else model.num_instances):
            id = instance_id(name, index)
            env = model.env
            if gpus:
                env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpu, gpu + gpus))), **env}
                gpu += gpus
            command = _instance(fleet, state_dir, name, id, f"{len(found)}", index=index)
            found.append(Child(id, "instance", command, env))
        if model.host_copy:
            found.append(Child(copy_of(state_dir, name).instance, "copy", _copy(state_dir, name), {}))
    for index in range(fleet.gateways):
        found.append(Child(f"gateway-{index}", "gateway", _gateway(state_dir, index), {}))
    names = [child.name for child in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two processes of the fleet would be named {name!r}: rename a model")
    return found


def launched(fleet: Fleet, state_dir: Path, order: Launch) -> Child:
    """The process that the controller asks for: without weights, of which the controller says where to get them."""
    digest = hashlib.blake2b(order.instance.encode(), digest_size=5).hexdigest()
    command = _instance(fleet, state_dir, order.model, order.instance, digest, starts_empty=True)
    model = fleet.models[order.model]
    return Child(order.instance, "instance", command, model.env, order)


def _gateway(state_dir: Path, index: int) -> Callable[[int], Sequence[str]]:
    return lambda _: own_command("_gateway", str(state_dir), str(index))


def _copy(state_dir: Path, model: str) -> Callable[[int], Sequence[str]]:
    return lambda _: own_command("_copy", str(state_dir), model)


def _instance(
    fleet: Fleet, state_dir: Path, name: str, id: str, key: str, index: int = 0, starts_empty: bool = False
) -> Callable[[int], Sequence[str]]:
    """The command of an instance of the model ``name``, given its epoch; ``key`` tells its sockets from others'."""
    sockets, controller, model = socket_dir(state_dir), controller_address(state_dir), fleet.models[name]
    # While observing, requests go round robin, as to the engines that observing stands in front of.
    policy = find_policy("round_robin" if fleet.observe else fleet.policy)
    step, engine_args = policy.step, model.engine_args()
    if policy.chunk is not None:
        engine_args = engine_args.model_copy(update={"max_batch_tokens": policy.chunk})
    listen = f"unix:{sockets / f'i-{key}.sock'}"
    options = [*_options(engine_args), "--reclaim-s", f"{fleet.limits.reclaim_s:g}"]
    if model.path is not None and (model.engine == "torch" or (model.engine == "vllm" and model.endpoints is None)):
        options += ["--model", model.path]
    if model.profile is not None:
        options += ["--profile", model.profile]
    if fleet.disaggregated or model.instances.scaled:  # drained instances hand their streams over
        options += ["--kv-listen", f"unix:{sockets / f'kv-{key}.sock'}"]
    if starts_empty:
        options.append("--standby")
        if _gives_weights(model):
            options += ["--weights-listen", f"unix:{sockets / f'w-{key}.sock'}"]
    if model.endpoints is None:
        return lambda epoch: instance_command(id, epoch, name, model.engine, listen, controller, step, options)
    if model.api_key_env is not None:
        options += ["--api-key-env", model.api_key_env]
    url = model.endpoints[index]
    return lambda epoch: endpoint_command(id, epoch, name, model.engine, url, listen, controller, step, options)


def _options(args: Section) -> Iterator[str]:
    for key, value in args.model_dump(exclude_none=True).items():
        yield f"--{key.replace('_', '-')}={value}"


def tell(text: str) -> None:
    """One notice on the terminal, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


class Terminal:
    """Lines for the person who started the fleet: what is up, what went wrong, and once, how to use it."""

    def __init__(self, fleet: Fleet, state_dir: Path, processes: Iterable[Child]) -> None:
        host, port = fleet.host_port
        self._fleet = fleet
        self._state_dir = state_dir
        self._url = f"http://{_in_url(_reachable(host))}:{port}"
        self._expected = {process.name for process in processes if process.role in ("instance", "gateway")}
        self._scaled = {name: model.instances for name, model in fleet.models.items() if model.instances.scaled}
        self._gateways: set[str] = set()
        self._ready: set[str] = set()
        self._short = list(self._scaled)
        self.stopping = False
        self.all_ready = asyncio.Event()
        self._began = time.monotonic()

    def begin(self) -> None:
        """The first lines."""
        mode = ", observing: requests go round robin" if self._fleet.observe else ""
        print(f"HyperFlexis {__version__}, policy {self._fleet.policy}{mode}", flush=True)
        for name, model in self._fleet.models.items():
            where = model.endpoints or [model.path or model.profile or ""]
            roles = ", disaggregated" if model.mode == "disaggregated" else ""
            if model.prefill is not None:
                roles += f", {model.prefill} for prompts"
            count = f"{model.num_instances}"
            if model.instances.scaled:
                count = f"{model.instances.min} to {model.instances.most}"
                count += f" (and {model.instances.standby} in standby)" if model.instances.standby else ""
            print(f"  {count} x {name} ({model.engine}: {', '.join(where)}){roles}", flush=True)
            if model.host_copy:
                size = preflight.host_copy_bytes(model) / (1 << 30)
                print(f"    and a copy of its weights in this machine's memory, {size:.2f} GiB", flush=True)
        print(f"  logs, state and journal: {self._state_dir}", flush=True)

    def changed(self, message: wire.Fleet | GatewayJoined) -> None:
        """Tell which instances became ready and which are gone."""
        if self.stopping:
            return
        match message:
            case GatewayJoined():
                self._gateways.add(message.gateway)
            case wire.Fleet():
                ready = {id for model in message.models.values() for id in model.ready}
                for id in sorted(ready - self._ready):
                    tell(f"{id} is ready")
                for id in sorted(self._ready - ready):
                    why = message.notices.get(id)
                    tell(f"{id} takes nothing new: {why}" if why else f"{id} is not ready any more")
                self._ready = ready
                self._short = [
                    name
                    for name, wanted in self._scaled.items()
                    if name not in message.models or len(message.models[name].ready) < wanted.min
                ]
            case _:
                assert_never(message)
        if self._expected <= self._ready | self._gateways and not self._short:
            self.all_ready.set()

    async def wait_ready(self) -> None:
        """Print how to use the fleet as soon as a client could."""
        while not self.all_ready.is_set():
            try:
                await asyncio.wait_for(self.all_ready.wait(), WAIT_NOTICE_S)
            except TimeoutError:
                missing = ", ".join([*sorted(self._expected - self._ready - self._gateways), *self._short])
                tell(f"waiting for {missing} (logs in {self._state_dir / 'logs'})")
        while not await _answers_ready(self._fleet.host_port):
            await asyncio.sleep(READY_POLL_S)
        name = next(iter(self._fleet.models))
        tell(f"ready after {time.monotonic() - self._began:.1f} s at {self._url}; Ctrl-C stops it. Try:")
        body = f'{{"model": "{name}", "prompt": "Hello", "max_tokens": 16, "stream": true}}'
        key = " -H 'authorization: Bearer KEY'" if self._fleet.api_keys_file is not None else ""
        print(f"  curl -N {self._url}/v1/completions -H 'content-type: application/json'{key} -d '{body}'", flush=True)


async def _answers_ready(host_port: tuple[str, int]) -> bool:
    host, port = host_port
    try:
        reader, writer = await asyncio.open_connection(_reachable(host), port)
    except OSError:
        return False
    try:
        writer.write(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        status = await asyncio.wait_for(reader.readline(), 2.0)
        return b" 200 " in status
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()


def _reachable(host: str) -> str:
    """An address to reach a listener at ``host`` by."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def serve(fleet: Fleet) -> None:
    """Run the fleet until SIGINT, SIGTERM or SIGHUP. Raises HyperFlexisError when it cannot be started."""
    assert fleet.state_dir is not None
    state_dir = Path(fleet.state_dir)
    preflight.check_models(fleet)
    if fleet.api_keys_file is not None:
        read_api_keys(Path(fleet.api_keys_file))
        warning = preflight.key_file_warning(Path(fleet.api_keys_file))
        if warning is not None:
            print(warning, file=sys.stderr, flush=True)
    # Prompts pass through the sockets in there: for this user alone.
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with Lock(state_dir):
        state = StateFile(state_dir)
        supervisor = Supervisor(state, state_dir / "logs", start_process, tell, fleet.limits.shutdown_grace_s)
        basis = started_with(fleet)
        obstacle = state.why_replace(basis)
        if obstacle is not None:
            await supervisor.clean_up(obstacle)
        adopted = state.survivors()
        fleet = _listening(fleet, state.state.listen, adopted)
        running = {
            name: sum(instance_id(name, index) in adopted for index in range(model.num_instances))
            + sum(child.launch is not None and child.launch.model == name for child in adopted.values())
            for name, model in fleet.models.items()
        }
        kept = {name for name in fleet.models if copy_of(state_dir, name).instance in adopted}
        preflight.check_memory(fleet, preflight.available_memory(), running, kept)
        fleet_file(state_dir).write_text(fleet.model_dump_json(indent=1, exclude_unset=True))
        gateway_config(fleet, state_dir, 0)  # what is wrong with it is said here and not in a child's log
        processes = children(fleet, state_dir)
        terminal = Terminal(fleet, state_dir, processes)
        state.record_serve(fleet.listen, basis)
        terminal.begin()
        launcher = Launcher(state, supervisor, lambda order: launched(fleet, state_dir, order), tell)
        launcher.adopt(supervisor.adopt())
        await _supervise(supervisor, processes, terminal, launcher, controller_address(state_dir))
        shutil.rmtree(socket_dir(state_dir), ignore_errors=True)
        state.forget_all()


def _listening(fleet: Fleet, before: str, adopted: Mapping[str, RunningChild]) -> Fleet:
    """The fleet with the port that it listens at: the one ``before``, if any of it runs on."""
    listen = before if adopted else fleet.listen
    fleet = fleet.model_copy(update={"listen": listen})
    if any(child.role == "gateway" for child in adopted.values()):
        return fleet  # the port is taken, by our own
    port = preflight.find_port(*fleet.host_port)
    return fleet.model_copy(update={"listen": f"{listen.rpartition(':')[0]}:{port}"})


async def _supervise(
    supervisor: Supervisor, fleet: Sequence[Child], terminal: Terminal, launcher: Launcher, controller: str
) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        tell("killing all processes" if supervisor.stopping else "stopping; once more to kill at once")
        terminal.stopping = True
        supervisor.stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    watchers = [
        asyncio.create_task(observe_fleet(controller, terminal.changed)),
        asyncio.create_task(terminal.wait_ready()),
        asyncio.create_task(launch_for(controller, launcher)),
    ]
    try:
        await supervisor.run(fleet)
    finally:
        for watcher in watchers:
            watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*watchers, return_exceptions=True)
    tell("stopped")
