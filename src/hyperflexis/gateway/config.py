"""All that a gateway process is told at its start. Built from the fleet file by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core.slo import Slo, SloClass
from ..errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose requests these are, and what they may ask for.

    ``weight`` multiplies the class's priority into a request's value, and its share of an overloaded fleet.
    ``default_class`` stands in when a request names no class. ``allowed_classes`` None allows all. ``floor`` is the
    tightest SLO that the tenant may ask for by itself, field by field; the promises of the classes allowed to it are
    its due and are not held against it.
    """

    name: str
    weight: float = 1.0
    default_class: str | None = None
    allowed_classes: frozenset[str] | None = None
    floor: Slo = field(default_factory=Slo)


ANONYMOUS = Tenant("anonymous")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one gateway process; each says what happens to what is over it.

    Over ``max_body_bytes``: 413. Over ``max_open_requests``: 429; over ``max_waiting_requests`` while the controller
    is away, or over ``max_connections``: 503; all with Retry-After. A request that is not complete within
    ``request_timeout_s`` gets 408; a connection idle for ``idle_timeout_s`` is closed. A client that leaves more than
    ``max_unsent_bytes`` of a stream unread, or reads nothing for ``stall_timeout_s`` while something waits for it, is
    cut and its request cancelled. ``controller_wait_s`` bounds the wait for a decision, and ``shutdown_grace_s`` the
    time that open streams get after SIGTERM.
    A stream whose instance was lost waits ``resume_wait_s`` for another, any request ``start_wait_s`` where none is
    ready and one is launched. ``max_choices`` bounds ``n`` times prompts.
    """

    max_body_bytes: int = 16 * MIB
    max_open_requests: int = 4096
    max_waiting_requests: int = 1024
    max_connections: int = 8192
    request_timeout_s: float = 30.0
    idle_timeout_s: float = 120.0
    max_unsent_bytes: int = MIB
    stall_timeout_s: float = 60.0
    controller_wait_s: float = 10.0
    shutdown_grace_s: float = 30.0
    resume_wait_s: float = 60.0
    start_wait_s: float = 600.0
    max_choices: int = 128


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """One gateway process.

    ``controller`` is a wire address (``unix:PATH`` or ``HOST:PORT``), ``token`` the fleet's shared word in Hello.
    ``models`` maps a served name to the directory with its tokenizer, None for engines that take text.
    ``default_class`` None means that a request that names no class is promised nothing beyond its own SLO fields.
    ``service_tiers`` maps OpenAI's tier names to classes. ``api_keys`` maps a key to the name of a tenant; when it is
    empty every request belongs to ``ANONYMOUS``. ``reuse_port`` lets several gateways share host and port.

    Raises ConfigError when a name refers to a class or tenant that is not there.
    """

    id: str
    controller: str
    models: Mapping[str, Path | None]
    host: str = "127.0.0.1"
    port: int = 8000
    classes: tuple[SloClass, ...] = ()
    default_class: str | None = None
    service_tiers: Mapping[str, str] = field(default_factory=dict)
    tenants: tuple[Tenant, ...] = ()
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    token: str = field(default="", repr=False)
    reuse_port: bool = False
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        classes = {c.name for c in self.classes}
        tenants = {t.name for t in self.tenants}
        named = [("default_class", self.default_class)]
        named += [(f"service_tiers.{tier}", name) for tier, name in self.service_tiers.items()]
        for tenant in self.tenants:
            named.append((f"tenants.{tenant.name}.default_class", tenant.default_class))
            named += [(f"tenants.{tenant.name}.allowed_classes", name) for name in tenant.allowed_classes or ()]
        for where, name in named:
            if name is not None and name not in classes:
                raise ConfigError(f"{where}: no class is named {name!r}; the classes are {sorted(classes)}")
        for name in self.api_keys.values():
            if name not in tenants:
                raise ConfigError(f"api_keys: no tenant is named {name!r}; the tenants are {sorted(tenants)}")
        if not self.models:
            raise ConfigError("models: a gateway serves at least one model")
