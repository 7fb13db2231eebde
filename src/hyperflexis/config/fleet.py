"""The fleet file: what it may say, and clear errors with line numbers for what it may not.

Read by the command line only; all else is given values. A key that is unknown, or known but not built yet, is refused
with its line and never ignored, since an ignored key is a promise that is silently not kept.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ..engines.profiles import load_profile
from ..errors import ConfigError
from ..policy.catalog import POLICIES, SCALERS, find_policy, find_scaler
from .document import Document, load_yaml
from .errors import describe

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,99}$")]
Milliseconds = Annotated[float, Field(gt=0, le=86_400_000, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class Section(BaseModel):
    """A mapping of the fleet file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Instances(Section):
    """`models.NAME.instances`: how many instances a model has. With a `max` above `min`, or with `standby`, they are
    launched and stopped as the load asks for it (docs/policies/scale.md)."""

    min: Annotated[int, Field(ge=0, le=1024)] = 1
    """Fewest instances. With 0 the first request after a pause waits until one has started."""
    max: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Most instances; `min` when absent."""
    standby: Annotated[int, Field(ge=0, le=1024)] = 0
    """Instances without weights besides, which wait to be woken: ready as soon as they have these."""

    @model_validator(mode="after")
    def _max_is_not_below_min(self) -> Self:
        if self.max is None and self.min == 0:
            raise ValueError("min is 0, which leaves none: set max, the most instances that it may have")
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is less than min ({self.min}): raise max, or lower min")
        return self

    @property
    def most(self) -> int:
        """The most instances, without shells."""
        return self.min if self.max is None else self.max

    @property
    def scaled(self) -> bool:
        """Whether they come and go."""
        return self.most > self.min or self.standby > 0


class TorchArgs(Section):
    """`models.NAME.args` with `torch`: options of our own engine."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and KV cache; the checkpoint's when absent."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads of each instance."""
    kv_tokens: Count | None = None
    """Context tokens that the KV cache holds; what the free memory allows when absent."""
    context_length: Count | None = None
    """Longest prompt and output together; the model's own when absent."""
    max_batch: Count = 64
    """Most requests decoded at once."""
    max_batch_tokens: Count = 2048
    """Most tokens computed in one iteration."""
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens of one KV block."""
    reserve_kv: bool = True
    """Whether a shell in standby has the memory of its KV cache already. `false`: it takes it when it is woken, which
    makes that longer, and fails where there is none by then; for `instances.standby`."""
    weights_over: Literal["nixl", "torch"] | None = None
    """What brings the weights that other instances give, before shared memory and TCP are tried: `nixl`, or
    `torch` (torch.distributed: NCCL between GPUs, else Gloo). For networks that are the fleet's own."""


class EmulatedArgs(Section):
    """`models.NAME.args` with `emulated`: options and faults of the emulated engine."""

    kv_tokens: Count | None = None
    """Context tokens that the KV cache holds; the profile's when absent."""
    context_length: Count | None = None
    """Longest prompt and output together; the profile's when absent."""
    max_batch: Count | None = None
    """Most requests decoded at once; the profile's when absent."""
    max_batch_tokens: Count | None = None
    """Most tokens of one iteration; the profile's when absent."""
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens of one KV block."""
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Relative standard deviation of iteration times."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of tokens and noise."""
    prior_scale: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Factor on the coefficients from which the fit starts, so that it has something to learn."""
    mean_output_tokens: Positive | None = None
    """Texts end by themselves after so many tokens on average; at their limit when absent."""
    start_scale: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Its start takes so many times what the profile's `start` says; 0: no longer than its process does."""
    die_after_tokens: Count | None = None
    """Fault: the process ends at once after so many output tokens."""
    hang_after_tokens: Count | None = None
    """Fault: iterations stop after so many output tokens while the process lives."""
    slow_factor: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Fault: iterations take so many times as long."""
    slow_after_tokens: Count | None = None
    """Fault: iterations are slow only after so many output tokens."""
    refuse: bool = False
    """Fault: every request is refused."""


class OpenAIArgs(Section):
    """`models.NAME.args` with `openai`: what is known of the servers."""

    server_model: str | None = None
    """The model's name there; when absent the same name, or the only one that the server lists."""
    token_ids: bool = False
    """The server takes and gives token ids, as vLLM does; needs `path` for the tokenizer."""
    max_batch: Count | None = None
    """Most requests sent to a server at once; more wait here."""
    context_length: Count | None = None
    """Longest prompt and output together; what the server says, else the profile's, when absent."""
    kv_tokens: Count | None = None
    """Context tokens that a server's KV cache holds; what the server says, else the profile's, when absent."""
    start_limit_s: Seconds = 600.0
    """How long to wait for a server that is still loading."""


class VllmArgs(Section):
    """`models.NAME.args` with `vllm`: how its servers are started, or what is known of those that run."""

    arguments: str = ""
    """Arguments of `vllm serve`, as one line; quoted as in a shell. They win over what is set here."""
    scheduler: Literal["hyperflexis", "vllm"] = "hyperflexis"
    """For servers that are started here: `hyperflexis` schedules inside vLLM, which needs HyperFlexis installed beside
    vLLM; `vllm` leaves it its own. Servers that run are asked which they have."""
    python: str | None = None
    """The interpreter of the environment that has vLLM, when that is not this one."""
    gpus: Count | None = None
    """GPUs of each instance: sets CUDA_VISIBLE_DEVICES, instance after instance; with
    `--tensor-parallel-size` among the arguments, as many."""
    server_model: str | None = None
    """The model's name at servers that run; when absent the same name, or the only one that the server lists."""
    max_batch: Count | None = None
    """Most requests at once: `--max-num-seqs`, which servers that run are taken to have been started with."""
    max_batch_tokens: Count | None = None
    """Most tokens of one iteration: `--max-num-batched-tokens`, likewise."""
    context_length: Count | None = None
    """Longest prompt and output together; what the server says when absent."""
    kv_tokens: Count | None = None
    """Context tokens that a server's KV cache holds; what the server says when absent."""
    start_limit_s: Seconds = 1800.0
    """How long to wait for a server that is still loading."""


Engine = Literal["torch", "emulated", "openai", "vllm"]
ENGINE_ARGS: dict[Engine, type[Section]] = {
    "torch": TorchArgs,
    "emulated": EmulatedArgs,
    "openai": OpenAIArgs,
    "vllm": VllmArgs,
}


class Model(Section):
    """`models.NAME`: one served model and its instances."""

    path: str | None = None
    """A Hugging Face model directory. `torch`, and `vllm` without endpoints, read weights and tokenizer from it, the
    others only the tokenizer."""
    engine: Engine
    """`torch` computes here; `emulated` keeps the times of a profile; `openai` stands for servers that already run;
    `vllm` for vLLM servers, which it starts where there are no endpoints."""
    args: dict[str, bool | int | float | str | None] = {}
    """The engine's own options, listed below by engine."""
    env: dict[str, str] = {}
    """Environment variables of its instances."""
    profile: str | None = None
    """A latency profile: a name of those shipped, or a JSON file. Needed by `emulated`; with `openai` and `vllm` what
    iterations are expected to take until they have been seen."""
    mode: Literal["colocated", "observe", "disaggregated"] = "colocated"
    """`disaggregated` computes prompts on some instances and hands their requests, with the KV, to others to decode.
    `observe` sends requests round robin and journals what the policy would have done. All models must agree."""
    instances: Instances = Instances()
    """How many instances; with endpoints, one for each of them."""
    host_copy: bool = False
    """Keep a copy of the weights in this machine's memory, read once: instances that come while none serves start from
    it, and not from disk. It takes the weights' size and a process. For `torch`, where instances come and go."""
    prefill: Count | None = None
    """With `mode: disaggregated`: how many of the instances begin with prompts alone. The same for all models. The
    others do both."""
    roles: Literal["adaptive", "static"] | None = None
    """With `mode: disaggregated`: `adaptive`, the default, turns instances to prompts alone and back as the load asks
    for it; `static` keeps what they begin as, and where `prefill` is given the other instances decode alone."""
    endpoints: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    """Base URLs of servers that run, without `/v1`; `engine: openai` needs them, `engine: vllm` may have them."""
    api_key_env: str | None = None
    """The environment variable with the key that these servers want."""

    @field_validator("endpoints")
    @classmethod
    def _endpoints_are_urls(cls, endpoints: list[str] | None) -> list[str] | None:
        for url in endpoints or ():
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"{url!r} is not a base URL: write http://HOST:PORT")
        if endpoints and len(set(endpoints)) < len(endpoints):
            raise ValueError("the same URL is listed twice")
        return endpoints

    @model_validator(mode="after")
    def _fits_engine(self) -> Self:
        if self.engine == "openai" and self.endpoints is None:
            raise ValueError("engine openai needs endpoints: list the base URLs of its servers")
        if self.engine not in ("openai", "vllm") and (self.endpoints is not None or self.api_key_env is not None):
            raise ValueError(f"endpoints and api_key_env belong to engines openai and vllm, not {self.engine}")
        given = self.instances.model_fields_set
        if self.endpoints is not None and "min" in given and self.instances.min != len(self.endpoints):
            raise ValueError(f"instances.min is {self.instances.min} for {len(self.endpoints)} endpoints: remove it")
        if self.instances.scaled and self.engine in ("openai", "vllm"):
            raise ValueError(
                f"instances.max and standby are for engines torch and emulated, not {self.engine}: remove them"
            )
        if self.host_copy and not (self.engine == "torch" and self.instances.scaled):
            raise ValueError(
                "host_copy is for engine torch, where instances come and go: set instances.max or standby, or remove it"
            )
        if self.args.get("reserve_kv") is False and not self.instances.standby:
            raise ValueError("args.reserve_kv is for shells that wait: set instances.standby, or remove it")
        if self.engine == "vllm" and self.path is None:
            raise ValueError("engine vllm needs path, a model directory; with endpoints its tokenizer.json is enough")
        if self.engine == "vllm" and self.endpoints is not None:
            for key in ("arguments", "scheduler", "python", "gpus"):
                if key in self.args:
                    raise ValueError(f"args.{key} is for servers that are started here: remove it, or endpoints")
        if self.engine == "openai" and self.path is None and self.args.get("token_ids"):
            raise ValueError("args.token_ids needs path, a directory with the model's tokenizer.json")
        if self.engine == "torch" and self.path is None:
            raise ValueError("engine torch needs path, a model directory: make one with `hyperflexis make-model DIR`")
        if self.engine == "emulated" and self.profile is None:
            raise ValueError("engine emulated needs profile: name a shipped one, or a JSON file")
        if self.mode == "observe" and self.instances.scaled:
            raise ValueError("mode observe changes nothing: remove instances.max and standby, or the mode")
        return self

    @model_validator(mode="after")
    def _can_hand_over(self) -> Self:
        if self.mode != "disaggregated":
            for key in ("prefill", "roles"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for mode disaggregated, not {self.mode}: remove it, or set that mode")
            return self
        if self.engine == "openai":
            raise ValueError("mode disaggregated: servers of engine openai give no KV away: use colocated or observe")
        if self.num_instances < 2:
            raise ValueError("mode disaggregated needs two instances: set instances.min to 2 or more")
        if self.prefill is not None and self.prefill >= self.num_instances:
            raise ValueError(
                f"prefill is {self.prefill} of {self.num_instances} instances, which leaves none to decode: "
                f"set it to {self.num_instances - 1} at most, or raise instances.min"
            )
        return self

    @property
    def num_instances(self) -> int:
        """Instances to keep running; the fewest where they come and go."""
        return len(self.endpoints) if self.endpoints is not None else self.instances.min

    @property
    def num_devices(self) -> int:
        """Devices of this machine that its instances need."""
        gpus = self.args.get("gpus") or 1
        return 0 if self.endpoints is not None else self.num_instances * int(gpus)

    def engine_args(self) -> Section:
        """``args`` with the engine's defaults."""
        return ENGINE_ARGS[self.engine].model_validate(self.args)


class Device(Section):
    """`devices[]`: what the instances started here may use."""

    kind: Name
    """Kind of device."""
    count: Count
    """How many there are, one for each instance: a fleet that begins with more is refused, one that is scaled gets no
    more."""
    memory_gb: Positive | None = None
    """Memory of each in 10⁹ bytes; models that need more are refused."""


class SloFields(Section):
    """`tenants.NAME.floor`: durations in milliseconds, each optional."""

    ttft_ms: Milliseconds | None = None
    """Time to first token."""
    tpot_ms: Milliseconds | None = None
    """Time per output token after the first."""
    e2e_ms: Milliseconds | None = None
    """Time to the last token."""


class SloClassFields(SloFields):
    """`classes[]`: a named promise."""

    name: Name
    """What requests call it."""
    priority: Positive = 1.0
    """Larger matters more; multiplies with the tenant's weight."""
    target: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Wanted share of requests that keep their promise."""


class TenantFields(Section):
    """`tenants.NAME`: who asks, and what they may ask for."""

    weight: Positive = 1.0
    """Multiplies the priority of its requests, and its share of an overloaded fleet."""
    default_class: str | None = None
    """Class of its requests that name none."""
    allowed_classes: list[str] | None = None
    """Classes it may ask for; all when absent."""
    floor: SloFields = SloFields()
    """The tightest SLO that it may ask for by itself."""


class Launcher(Section):
    """`launcher`: where instances come from."""

    kind: Literal["local", "static", "ray", "kubernetes"]
    """`local` starts them on this machine; `static` only stands in front of `endpoints`. `ray` and `kubernetes` are
    not built yet."""

    @field_validator("kind")
    @classmethod
    def _kind_is_built(cls, kind: str) -> str:
        if kind in ("ray", "kubernetes"):
            raise ValueError(f"{kind} is not built yet: use local or static")
        return kind


class LimitFields(Section):
    """`limits`: bounds of each gateway, of the queue, and of what instances are given time for."""

    max_body_mb: Positive = 16.0
    """Largest request body in MiB; over it: 413."""
    max_open_requests: Count = 4096
    """Requests in flight; over it: 429 with Retry-After."""
    max_waiting_requests: Count = 1024
    """Requests that wait while the controller restarts; over it: 503."""
    max_connections: Count = 8192
    """Client connections; over it: 503."""
    max_backlog_s: Seconds = 600.0
    """Predicted seconds of queue on the best instance; over it: 429 with Retry-After."""
    resume_wait_s: Seconds = 60.0
    """How long a stream whose instance was lost waits for another; then it ends with an error."""
    start_wait_s: Seconds = 600.0
    """How long a request waits for the first instance of a model that has none ready and is scaled; over it: 503."""
    reclaim_s: Seconds = 30.0
    """SIGUSR1 to an instance says that its machine is taken back after this time: by then its streams are elsewhere."""
    request_timeout_s: Seconds = 30.0
    """Time for a client to send a whole request; over it: 408."""
    idle_timeout_s: Seconds = 120.0
    """An idle connection is closed after this time."""
    stall_timeout_s: Seconds = 60.0
    """A client that reads nothing for this time is cut and its request cancelled."""
    shutdown_grace_s: Seconds = 5.0
    """Time for open streams to end when the fleet is stopped."""


DEFAULT_CLASSES = [
    SloClassFields(name="interactive", ttft_ms=1000, tpot_ms=100, priority=2),
    SloClassFields(name="batch", e2e_ms=600_000, priority=1),
]
DEFAULT_SERVICE_TIERS = {"priority": "interactive", "flex": "batch"}


class Fleet(Section):
    """The fleet file. Paths are relative to it."""

    models: Annotated[dict[Name, Model], Field(min_length=1)]
    """The served models by name. `model: {name: NAME, ...}` is the short form for one."""
    devices: list[Device] | None = None
    """What the machine has; not checked when absent."""
    classes: Annotated[list[SloClassFields], Field(min_length=1)] = DEFAULT_CLASSES
    """The promises that requests may name."""
    default_class: str | None = None
    """Class of requests that name none; the first class when absent."""
    service_tiers: dict[str, str] | None = None
    """OpenAI's `service_tier` values and the classes they mean."""
    policy: str = Field(
        default="hyperflexis",
        description=f"Who decides which instance gets a request and what it runs next: {', '.join(POLICIES)}. All but "
        "the first are for comparison (docs/policies/baselines.md). `NAME@512`: at most 512 tokens in an iteration.",
    )
    scaler: str = Field(
        default="forecast",
        description=f"Who decides how many instances a scaled model has: {', '.join(SCALERS)}. All but the first are "
        "for comparison (docs/policies/scale.md); their numbers follow as in `concurrency@4,2,10`.",
    )
    listen: Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}$")] = "127.0.0.1:8080"
    """HOST:PORT for clients; port 0 takes a free one."""
    gateways: Annotated[int, Field(ge=1, le=64)] = 1
    """Gateway processes that share the port."""
    tenants: dict[Name, TenantFields] = {}
    """Who may ask for what; needs `api_keys_file`."""
    api_keys_file: str | None = None
    """A YAML file of `KEY: TENANT`. With it, requests without a known key are refused."""
    launcher: Launcher | None = None
    """`static` when all models have endpoints, else `local`."""
    limits: LimitFields = LimitFields()
    """Bounds."""
    state_dir: str | None = None
    """Pids, sockets, logs and the journal; `.hyperflexis/FILE` beside the file when absent."""

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: list[SloClassFields]) -> list[SloClassFields]:
        names = [c.name for c in classes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two classes are named {name!r}: rename one")
        return classes

    @field_validator("listen")
    @classmethod
    def _port_exists(cls, listen: str) -> str:
        if int(listen.rpartition(":")[2]) > 65535:
            raise ValueError("the port is above 65535")
        return listen

    @field_validator("policy")
    @classmethod
    def _policy_fits(cls, spec: str, info: ValidationInfo) -> str:
        try:
            chunk = find_policy(spec).chunk
        except ConfigError as error:
            raise ValueError(str(error)) from error
        models: dict[str, Model] = info.data.get("models", {})
        for name, model in models.items():
            if chunk is not None and "max_batch_tokens" not in ENGINE_ARGS[model.engine].model_fields:
                raise ValueError(f"the servers of models.{name} form their iterations: write {spec.partition('@')[0]}")
        return spec

    @field_validator("scaler")
    @classmethod
    def _scaler_exists(cls, spec: str) -> str:
        try:
            find_scaler(spec)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return spec

    @model_validator(mode="after")
    def _refers_to_what_is_there(self) -> Self:
        names = {c.name for c in self.classes}
        wanted = [("default_class", self.default_class)]
        wanted += [(f"service_tiers.{tier}", name) for tier, name in (self.service_tiers or {}).items()]
        for tenant, fields in self.tenants.items():
            wanted.append((f"tenants.{tenant}.default_class", fields.default_class))
            wanted += [(f"tenants.{tenant}.allowed_classes", name) for name in fields.allowed_classes or ()]
        for where, name in wanted:
            if name is not None and name not in names:
                raise ValueError(f"{where}: no class is named {name!r}; the classes are {', '.join(sorted(names))}")
        if self.tenants and self.api_keys_file is None:
            raise ValueError("tenants are told apart by their keys: set api_keys_file, or remove tenants")
        for mode, found in (
            ("observe", "observe and some do not"),
            ("disaggregated", "are disaggregated and some are not"),
        ):
            if len({model.mode == mode for model in self.models.values()}) > 1:
                raise ValueError(f"some models {found}: give these a fleet of their own")
        for key, what in (("prefill", "number"), ("roles", "word")):
            if len({getattr(model, key) for model in self.models.values()}) > 1:
                raise ValueError(f"{key} differs between models: give each the same {what}, or a fleet of its own")
        if self.launcher is not None:
            for name, model in self.models.items():
                if (self.launcher.kind == "static") != (model.endpoints is not None):
                    raise ValueError(
                        f"launcher {self.launcher.kind} cannot serve models.{name} with engine {model.engine}: "
                        "remove launcher, which is then chosen by engine"
                    )
        local = sum(model.num_devices for model in self.models.values())
        if self.devices is not None and local > sum(device.count for device in self.devices):
            there = sum(device.count for device in self.devices)
            raise ValueError(f"the instances need {local} devices, of which there are {there}: lower instances.min")
        return self

    @property
    def observe(self) -> bool:
        """Whether the policy's decisions are only noted."""
        return any(model.mode == "observe" for model in self.models.values())

    @property
    def disaggregated(self) -> bool:
        """Whether requests are handed over from where their prompts are computed."""
        return any(model.mode == "disaggregated" for model in self.models.values())

    @property
    def prefill(self) -> int:
        """How many instances of each model begin with prompts alone."""
        return next(iter(self.models.values())).prefill or 0

    @property
    def static_roles(self) -> bool:
        """Whether instances keep the roles that they begin with."""
        return next(iter(self.models.values())).roles == "static"

    @property
    def tiers(self) -> dict[str, str]:
        """OpenAI's tiers; those of the default classes when neither classes nor tiers are given."""
        if self.service_tiers is not None:
            return self.service_tiers
        return {} if "classes" in self.model_fields_set else DEFAULT_SERVICE_TIERS

    @property
    def host_port(self) -> tuple[str, int]:
        """``listen`` in two."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    def digest(self) -> str:
        """A short name of this content."""
        return hashlib.blake2b(self.model_dump_json().encode(), digest_size=8).hexdigest()


def read_fleet(file: Path) -> Fleet:
    """The fleet file with absolute paths. Raises ConfigError naming file, line, key and remedy."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give the path of a fleet file (YAML)") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text") from error
    document = load_yaml(text, str(file))
    data = document.data
    if not isinstance(data, dict):
        raise ConfigError(f"{file}:1: a fleet file is a mapping that begins with `model:` or `models:`")
    if "model" in data:
        if "models" in data:
            raise ConfigError(f"{document.at(('model',))}: stands beside models; give one of them")
        model = data.pop("model")
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            raise ConfigError(f"{document.at(('model',))}: needs a name: `model: {{name: NAME, ...}}`")
        name = model.pop("name")
        data["models"] = {name: model}
        document.rename(("model",), ("models", name))
    try:
        fleet = Fleet.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise ConfigError(describe(error, document, Fleet)) from error
    problems = []
    for name, entry in fleet.models.items():
        try:
            entry.engine_args()
        except ValidationError as error:
            problems.append(describe(error, document, ENGINE_ARGS[entry.engine], ("models", name, "args")))
    if problems:
        raise ConfigError("\n".join(problems))
    return _resolve(fleet, file, document)


def _resolve(fleet: Fleet, file: Path, document: Document) -> Fleet:
    base = file.resolve().parent

    def absolute(path: str) -> str:
        return str((base / Path(path).expanduser()).resolve())

    models = {}
    for name, model in fleet.models.items():
        profile = model.profile
        if profile is not None:
            if "/" in profile or profile.endswith(".json"):
                profile = absolute(profile)
            try:
                has_start = load_profile(profile).start is not None
            except ConfigError as error:
                raise ConfigError(f"{document.at(('models', name, 'profile'))}: {error}") from error
            if model.args.get("start_scale") and not has_start:
                where = document.at(("models", name, "args", "start_scale"))
                raise ConfigError(
                    f"{where}: profile {profile} does not say what a start takes: remove it, or add `start`"
                )
        path = None if model.path is None else absolute(model.path)
        models[name] = model.model_copy(update={"path": path, "profile": profile})
    state_dir = absolute(fleet.state_dir) if fleet.state_dir is not None else str(base / ".hyperflexis" / file.stem)
    api_keys_file = None if fleet.api_keys_file is None else absolute(fleet.api_keys_file)
    return fleet.model_copy(update={"models": models, "state_dir": state_dir, "api_keys_file": api_keys_file})


def read_api_keys(file: Path) -> dict[str, str]:
    """Key -> tenant. Raises ConfigError naming the file and line, and never a key."""
    try:
        document = load_yaml(file.read_text(encoding="utf-8"), str(file))
    except OSError as error:
        raise ConfigError(f"api_keys_file {file}: {error.strerror}") from error
    keys = document.data
    if not isinstance(keys, dict) or not keys:
        raise ConfigError(f"{file}:1: an API key file is a mapping of KEY: TENANT")
    for key, tenant in keys.items():
        if not isinstance(key, str) or not isinstance(tenant, str):
            # The key itself is a secret and stays out of the message.
            raise ConfigError(f"{file}:{document.line((key,))}: key and tenant are both text; quote them")
    return keys
