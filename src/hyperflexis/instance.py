"""`hyperflexis instance`: builds one engine from the command line and hosts it.

Engines are imported here, one of them per process, so that a machine without torch runs the others.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from pydantic import ValidationError

from .config import ENGINE_ARGS, EmulatedArgs, Engine, OpenAIArgs, Section, TorchArgs, VllmArgs
from .core.instance import TOPOLOGY
from .engines import base
from .engines.host import InstanceIdentity, run_instance
from .engines.profiles import load_profile
from .errors import HyperFlexisError
from .launch.local import process_age_s
from .policy.catalog import STEPS, StepFunctions
from .transfer.auth import TOKEN_VARIABLE


async def run(args: argparse.Namespace) -> None:
    """Host the engine that the arguments describe until SIGTERM. Raises HyperFlexisError for what does not fit."""
    identity = InstanceIdentity(args.id, args.epoch, labels=labels(args.label))
    engine = build(args, fleet_token(kv_listen=args.kv_listen, weights_listen=args.weights_listen))
    await run_instance(
        engine,
        identity,
        args.listen,
        args.controller,
        standby=args.standby,
        process_s=process_age_s(),
        reclaim_s=args.reclaim_s,
    )


def labels(given: Sequence[str]) -> dict[str, str]:
    """Where the instance is: this host, unless it was said otherwise. Raises HyperFlexisError for what is no label."""
    found = {"host": socket.gethostname()}
    for one in given:
        name, _, value = one.partition("=")
        if name not in TOPOLOGY or not value:
            raise HyperFlexisError(f"--label {one}: give NAME=VALUE, where NAME is one of {', '.join(TOPOLOGY)}")
        found[name] = value
    return found


def fleet_token(**listen: str | None) -> str:
    """The word that instances must know to get KV or weights from each other. Raises HyperFlexisError where anybody
    could. ``listen``: the addresses at which they are to be had, by their flags."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    for name, address in listen.items():
        if address is not None and not address.startswith("unix:") and not token:
            what = "requests' KV" if name == "kv_listen" else "the model's weights"
            raise HyperFlexisError(
                f"--{name.replace('_', '-')} {address} would give {what} to anybody: set {TOKEN_VARIABLE}, the same "
                "for all instances of the fleet, or listen at unix:PATH"
            )
    return token


def build(args: argparse.Namespace, token: str) -> base.Engine:
    """The engine, not yet started. It gives KV and weights to those that know the fleet's ``token``."""
    if args.weights_listen is not None and args.engine != "torch":
        raise HyperFlexisError(
            "--weights-listen is for the engine that has weights to give: torch; servers of vLLM give them with "
            "--load-format hyperflexis among their --arguments"
        )
    step = STEPS[args.step]
    match _options(args):
        case TorchArgs() as options:
            return _torch(args, options, step, token)
        case EmulatedArgs() as options:
            return _emulated(args, options, step, token)
        case OpenAIArgs() as options:
            return _openai(args, options)
        case VllmArgs() as options:
            return _vllm(args, options, step, token)
        case options:
            raise AssertionError(f"no engine takes {options!r}")


def _options(args: argparse.Namespace) -> Section:
    """The engine's options out of the flags. Raises HyperFlexisError naming the flag."""
    engine: Engine = args.engine
    model = ENGINE_ARGS[engine]
    given = {k.removeprefix("option_"): v for k, v in vars(args).items() if k.startswith("option_") and v is not None}
    foreign = sorted(set(given) - set(model.model_fields))
    if foreign:
        raise HyperFlexisError(f"--{foreign[0].replace('_', '-')} is not an option of engine {engine}")
    try:
        return model.model_validate_strings(given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise HyperFlexisError(f"--{flag} {first['input']}: {first['msg']}") from error


def _torch(args: argparse.Namespace, options: TorchArgs, step: StepFunctions, token: str) -> base.Engine:
    if args.model is None:
        raise HyperFlexisError("engine torch needs --model DIR; make one with: hyperflexis make-model DIR --size 20m")
    try:
        from .engines.torch.engine import TorchConfig, TorchEngine
    except ModuleNotFoundError as error:
        raise HyperFlexisError(f"engine torch needs {error.name}: pip install 'hyperflexis[torch]'") from error
    directory: Path = args.model
    name = args.name or directory.resolve().name
    values = options.model_dump()
    return TorchEngine(
        TorchConfig(
            model=name,
            directory=directory,
            step=step,
            kv_listen=args.kv_listen,
            kv_token=token,
            weights_listen=args.weights_listen,
            **values,
        )
    )


def _emulated(args: argparse.Namespace, options: EmulatedArgs, step: StepFunctions, token: str) -> base.Engine:
    from .engines.emulated import EmulatedConfig, EmulatedEngine, Faults

    if args.profile is None:
        raise HyperFlexisError("engine emulated needs --profile NAME or --profile FILE.json")
    profile = load_profile(args.profile)
    values = options.model_dump()
    faults = Faults(**{fault.name: values.pop(fault.name) for fault in fields(Faults)})
    return EmulatedEngine(
        EmulatedConfig(
            model=args.name or profile.model,
            profile=profile,
            step=step,
            faults=faults,
            kv_listen=args.kv_listen,
            kv_token=token,
            **values,
        )
    )


def _openai(args: argparse.Namespace, options: OpenAIArgs) -> base.Engine:
    from .engines.openai import OpenAIConfig, OpenAIEngine

    if args.kv_listen is not None:
        raise HyperFlexisError("--kv-listen is for the engines that have KV to give: torch, emulated and vllm")
    if args.url is None or args.name is None:
        raise HyperFlexisError("engine openai needs --url URL of a running server and --name MODEL")
    profile = None if args.profile is None else load_profile(args.profile)
    return OpenAIEngine(
        OpenAIConfig(args.name, args.url, api_key_env=args.api_key_env, profile=profile, **options.model_dump())
    )


def _vllm(args: argparse.Namespace, options: VllmArgs, step: StepFunctions, token: str) -> base.Engine:
    from .engines.vllm.engine import VllmConfig, VllmEngine
    from .engines.vllm.server import Recipe

    if (args.url is None) == (args.model is None):
        raise HyperFlexisError("engine vllm needs --url URL of a running server, or --model DIR to start one")
    directory: Path | None = args.model
    name = args.name or (directory.resolve().name if directory is not None else None)
    if name is None:
        raise HyperFlexisError("engine vllm with --url needs --name MODEL")
    recipe = None
    if directory is not None:
        try:
            arguments = tuple(shlex.split(options.arguments))
        except ValueError as error:
            raise HyperFlexisError(f"--arguments {options.arguments!r}: {error}; quote it as in a shell") from error
        recipe = Recipe(
            name=name,
            directory=directory,
            python=options.python or sys.executable,
            scheduler=options.scheduler == "hyperflexis",
            profile=args.profile,
            gives_kv=args.kv_listen is not None,
            max_batch=options.max_batch,
            max_batch_tokens=options.max_batch_tokens,
            arguments=arguments,
        )
    values = options.model_dump(exclude={"arguments", "scheduler", "python", "gpus"})
    profile = None if args.profile is None else load_profile(args.profile)
    return VllmEngine(
        VllmConfig(
            name,
            args.url or "",
            api_key_env=args.api_key_env,
            profile=profile,
            step=step.plan,
            recipe=recipe,
            kv_listen=args.kv_listen,
            kv_token=token,
            **values,
        )
    )
