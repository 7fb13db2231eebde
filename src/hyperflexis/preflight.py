"""What must hold before a fleet is started: the port is free, the models are there, the memory suffices.

Each check raises HyperFlexisError with the remedy; nothing has been started by then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

from .config import Fleet, Model, TorchArgs
from .engines.torch.config import DTYPE_BYTES, ModelConfig, load_config
from .errors import HyperFlexisError

PROCESS_BYTES = 400 << 20
"""A torch engine before its weights: the interpreter, torch and work space (measured on Linux)."""
LEAST_KV_TOKENS = 512
"""What an engine without `kv_tokens` is counted with: it sizes its cache by what it finds free."""


def find_port(host: str, port: int) -> int:
    """``port`` if it can be listened at, or a free one for 0. Raises HyperFlexisError when it is taken."""
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise HyperFlexisError(f"listen: host {host!r} is not known here; try 127.0.0.1 or 0.0.0.0") from error
    with socket.socket(address[0], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address[4])
            probe.listen(1)
        except OSError as error:
            raise HyperFlexisError(
                f"port {port} on {host} cannot be listened at ({error.strerror}). Stop what uses it "
                f"(`ss -ltnp 'sport = :{port}'` names it), or set another `listen: {host}:PORT` in the fleet file"
            ) from error
        free: int = probe.getsockname()[1]
    return free


def check_models(fleet: Fleet) -> None:
    """Every model directory that the fleet names has what its engine reads."""
    for name, model in fleet.models.items():
        if model.path is not None:
            computes = model.engine in ("torch", "vllm") and model.endpoints is None
            _check_model(f"models.{name}.path", Path(model.path), needs_weights=computes)


def _check_model(key: str, path: Path, needs_weights: bool) -> None:
    if not path.is_dir():
        raise HyperFlexisError(
            f"{key}: no model is at {path}. Name a Hugging Face model directory, "
            f"or make a small random one: hyperflexis make-model {path} --size 20m"
        )
    wanted = ["tokenizer.json", *(["config.json"] if needs_weights else [])]
    missing = [file for file in wanted if not (path / file).is_file()]
    if needs_weights and not any(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise HyperFlexisError(
            f"{key}: {path} lacks {', '.join(missing)}; is it a complete Hugging Face model directory?"
        )


def key_file_warning(file: Path) -> str | None:
    """A warning when others on this machine can read the keys."""
    if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        return f"warning: others here can read {file}: chmod 600 it"
    return None


def check_memory(
    fleet: Fleet, available: int | None, running: Mapping[str, int] = {}, kept: Collection[str] = ()
) -> None:
    """The torch models fit: those on the CPU into ``available`` bytes, those elsewhere into the given devices, and what
    the host's memory keeps of either.

    ``running`` says how many instances of a model run already, and so are not among what is available; ``kept`` names
    the models of which a copy is there already.
    """
    host_bytes = 0
    parts = []
    for name, model in fleet.models.items():
        args = model.engine_args()
        if not isinstance(args, TorchArgs):
            continue
        weights, kv = _weight_bytes(model, args), _kv_bytes(model, args)
        if model.host_copy and name not in kept:
            host_bytes += host_copy_bytes(model)
            parts.append(f"a copy of {name}'s weights ({_gib(host_copy_bytes(model))} with its process)")
        per_instance = f"{_gib(weights)} weights + {_gib(kv)} KV cache"
        if args.device == "cpu":
            num_new = model.instances.most + model.instances.standby - running.get(name, 0)
            # A shell that is woken becomes one of the others, and takes its KV cache then.
            waits = 0 if args.reserve_kv else min(model.instances.standby, num_new)
            host_bytes += num_new * (weights + kv + PROCESS_BYTES) - waits * kv
            parts.append(f"{num_new} x {name} ({per_instance} + {_gib(PROCESS_BYTES)} process)")
        else:
            sizes = [device.memory_gb * 1e9 for device in fleet.devices or () if device.memory_gb is not None]
            if sizes and weights + kv > max(sizes):
                raise HyperFlexisError(
                    f"models.{name}: one instance needs {_gib(weights + kv)} ({per_instance}), and the largest device "
                    f"has {_gib(max(sizes))}: use a smaller model or dtype, or lower args.kv_tokens"
                )
    if available is not None and host_bytes > available:
        raise HyperFlexisError(
            f"the fleet needs about {_gib(host_bytes)} of memory and {_gib(available)} are available: "
            f"{'; '.join(parts)}. Lower instances.min (or max) or args.kv_tokens, or use a smaller model or dtype"
            f"{', or remove host_copy' if any(model.host_copy for model in fleet.models.values()) else ''}"
        )


def host_copy_bytes(model: Model) -> int:
    """What the copy of a model's weights in the host's memory takes, its process included."""
    args = model.engine_args()
    assert isinstance(args, TorchArgs)
    return _weight_bytes(model, args) + PROCESS_BYTES


def available_memory() -> int | None:
    """Bytes that may still be used on this machine and in this container; None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / file).read_text()) for file in ("memory.max", "memory.current"))
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # File pages are counted as used there, and are given back when memory is wanted.
        found.append(limit - used + int(stats.get("inactive_file", 0)) + int(stats.get("active_file", 0)))
    if not found:
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _weight_bytes(model: Model, args: TorchArgs) -> int:
    path, config = _model(model)
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return stored * DTYPE_BYTES[args.dtype or config.dtype] // DTYPE_BYTES[config.dtype]


def _kv_bytes(model: Model, args: TorchArgs) -> int:
    _, config = _model(model)
    return (args.kv_tokens or LEAST_KV_TOKENS) * config.kv_elements_per_token * DTYPE_BYTES[args.dtype or config.dtype]


def _model(model: Model) -> tuple[Path, ModelConfig]:
    assert model.path is not None
    return Path(model.path), load_config(Path(model.path))


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"
