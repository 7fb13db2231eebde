from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

from hyperflexis.calibrate_csv import read_samples
from hyperflexis.calibrate_fit import GridAxes, Predict, Sample, fit, fit_table, knots_of, left_out, mape
from hyperflexis.calibrate_sizes import MODELS, find_shape, kv_bytes_per_token, kv_capacity_tokens, weight_bytes
from hyperflexis.cli import main
from hyperflexis.core.latency import Coefficients
from hyperflexis.engines.profiles import load_profile
from hyperflexis.errors import ConfigError, HyperFlexisError

pytest.importorskip("scipy")

CURVE = ((0.0, 0.0), (128.0, 40.0), (256.0, 100.0), (512.0, 300.0))
TRUTH = Coefficients(0.006, 2e-5, 1e-9, 6e-6, 4e-8, curve=CURVE)
STRAIGHT = Coefficients(0.006, 2e-5, 1e-9, 6e-6, 4e-8)
PROMPTS = (0, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (0, 1, 8, 64, 256)
CONTEXTS = (128, 1024, 4096)


def samples_of(truth: Coefficients) -> list[Sample]:
    """A full grid of iterations that take exactly what ``truth`` says."""
    found = []
    for prompt, batch, context in product(PROMPTS, BATCHES, CONTEXTS):
        if prompt or batch:
            shape = (prompt, 0.5 * prompt * prompt, batch, batch * context)
            lines = {"tokens": prompt} if prompt else {}
            lines |= {"decodes": batch, "context": context} if batch else {}
            found.append(Sample(*shape, truth.predict(*shape), lines))
    return found


def csv_of(path: Path, samples: Sequence[Sample]) -> Path:
    """The samples in the columns of composed iterations, with a second device's rows among them."""
    rows = ["device,prefill_tokens,decode_batch,ctx_per_req,iter_ms"]
    for s in samples:
        context = s.kv_tokens / s.decodes if s.decodes else 0
        rows.append(f"a,{s.prefill_tokens},{s.decodes},{context},{1e3 * s.seconds!r}")
        rows.append(f"b,{s.prefill_tokens},{s.decodes},{context},{2e3 * s.seconds!r}")
    path.write_text("\n".join(rows) + "\n")
    return path


def calibrate(*arguments: object) -> int:
    return main(["calibrate", *map(str, arguments)])


STATED = ("--model", "llama-3.1-8b", "--device-kind", "h100", "--source", "invented")


def test_the_fit_finds_the_coefficients_and_the_curve() -> None:
    found = fit(samples_of(TRUTH), (128, 256, 512))
    for name in ("c0", "c1", "c2", "c3", "c4"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-4)
    assert [y for _, y in found.curve] == pytest.approx([y for _, y in CURVE], rel=1e-3)
    assert found.q90 < 1e-6


def test_without_knots_the_fit_is_a_straight_line() -> None:
    found = fit(samples_of(STRAIGHT), ())
    assert found.curve == ()
    assert [found.c0, found.c1, found.c2, found.c3, found.c4] == pytest.approx([0.006, 2e-5, 1e-9, 6e-6, 4e-8])


def test_no_coefficient_is_negative_and_q90_is_what_nine_in_ten_stay_under() -> None:
    # Decodes that get faster with context would ask for a negative c4.
    odd = [Sample(0, 0, 8, 8 * x, s, {}) for x, s in ((100, 0.012), (1000, 0.011), (2000, 0.010))]
    found = fit(odd, ())
    assert min(found.c0, found.c1, found.c2, found.c3, found.c4) >= 0.0
    assert found.c4 == 0.0
    late = [s.seconds / found.predict(*s.shape) - 1.0 for s in odd]
    assert found.q90 == pytest.approx(max(late))


def test_a_fit_needs_decodes_and_prompts_that_tell_c1_from_c2() -> None:
    with pytest.raises(HyperFlexisError, match="no iteration of decodes alone"):
        fit([s for s in samples_of(TRUTH) if s.prefill_tokens], ())
    assert knots_of(samples_of(TRUTH)) == (128, 256, 512, 1024)
    assert knots_of(samples_of(TRUTH), 0) == ()
    assert knots_of([s for s in samples_of(TRUTH) if s.prefill_tokens <= 512]) == (128,)


def test_a_table_follows_what_no_formula_can() -> None:
    def step(s: Sample) -> Sample:
        """Half as long again from 64 decodes on."""
        return Sample(*s.shape, s.seconds * (1.5 if s.decodes >= 64 else 1.0), s.lines)

    samples = [step(s) for s in samples_of(STRAIGHT)]
    formula = fit(samples, knots_of(samples))
    tokens = (128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 4352.0)
    table = fit_table(samples, formula, GridAxes(tokens, (1.0, 8.0, 64.0, 256.0), (128.0, 4096.0)))

    def device(prefill: float, attention: float, decodes: float, kv: float) -> float:
        if prefill:
            return table.prompt_s(prefill, attention, decodes, kv)
        a, b, _ = table.decode_line(decodes, kv)
        return a + b * kv

    before, after = mape(samples, formula.predict), mape(samples, device)
    assert before["decode"] is not None and before["decode"] > 0.05
    assert after["decode"] is not None and after["decode"] < 1e-3
    assert after["prefill"] is not None and after["prefill"] < 1e-3
    assert after["mixed"] is not None and before["mixed"] is not None and after["mixed"] < 0.3 * before["mixed"]


def test_table_rows_never_fall_with_context() -> None:
    noisy = [
        Sample(*s.shape, s.seconds * (1.2 if s.lines.get("context") == 128 else 1.0), s.lines)
        for s in samples_of(TRUTH)
    ]
    table = fit_table(noisy, TRUTH, GridAxes((128.0, 4096.0), (1.0, 256.0), (128.0, 1024.0, 4096.0)))
    for row in (*table.decode.seconds, *(row for plane in table.prompt.seconds for row in plane)):
        assert list(row) == sorted(row)


def test_errors_are_means_over_each_regime() -> None:
    samples = [Sample(0, 0, 1, 9, 1.0), Sample(0, 0, 2, 9, 2.0), Sample(5, 9, 0, 0, 4.0)]
    assert mape(samples, lambda *_: 1.0) == {"prefill": 0.75, "decode": 0.25, "mixed": None}


def test_a_left_out_line_is_not_shown_to_the_fit_and_edges_are_apart() -> None:
    samples = [
        Sample(0, 0, batch, batch * context, float(batch), {"decodes": batch, "context": context})
        for batch in (1, 2, 4)
        for context in (10, 20)
    ]
    shown: list[set[tuple[float, float]]] = []

    def build(rest: Sequence[Sample]) -> Predict:
        shown.append({(s.lines["decodes"], s.lines["context"]) for s in rest})
        return lambda _p, _a, decodes, _kv: 1.5 * decodes if decodes == 2 else 2.0 * decodes

    found = left_out(samples, build)
    # Decodes 1, 2 and 4, then contexts 10 and 20; only decodes 2 lie between others.
    assert [len(rest) for rest in shown] == [4, 4, 4, 3, 3]
    assert {decodes for decodes, _ in shown[1]} == {1, 4}
    assert {context for _, context in shown[3]} == {20}
    assert found.inner["decode"] == pytest.approx(0.5)
    assert found.by_axis["decodes"]["decode"] == pytest.approx(0.5)
    assert found.by_axis["context"]["decode"] is None
    # Four on the edges of decodes are off by 1, and so are, of all six on those of context, all but the two of 2.
    assert found.outer["decode"] == pytest.approx((4 * 1.0 + 4 * 1.0 + 2 * 0.5) / 10)


def test_the_command_writes_a_profile_and_prints_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = csv_of(tmp_path / "measured.csv", samples_of(TRUTH))
    out, report = tmp_path / "mine.json", tmp_path / "errors.json"
    assert calibrate(file, "--where", "device=a", *STATED, "--out", out, "--json", report) == 0
    profile = load_profile(str(out))
    assert (profile.name, profile.model, profile.source) == ("mine", "llama-3.1-8b", "invented")
    assert profile.iteration_s(1024, 524288, 8, 8000) == pytest.approx(TRUTH.predict(1024, 524288, 8, 8000), rel=1e-3)
    assert profile.domain.contains(4096, 256, 256 * 4096) and not profile.domain.contains(4097, 1, 1)
    assert (profile.kv_capacity_tokens, profile.context_length) == (396266, 131072)
    assert (profile.max_batch, profile.max_batch_tokens) == (256, 8192)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "mine: 90 iterations"
    assert printed[2].split() == ["fitted", "0.0%", "0.0%", "0.0%"]
    errors = json.loads(report.read_text())
    assert errors["left_out_mape"] == profile.left_out_mape
    assert errors["left_out_by_axis"].keys() == {"tokens", "decodes", "context"}


def test_a_table_is_written_on_the_lines_that_were_asked_for(tmp_path: Path) -> None:
    file = csv_of(tmp_path / "measured.csv", samples_of(TRUTH))
    out = tmp_path / "mine.json"
    lines = ("--table", "--table-decodes", "1,64,256", "--table-context", "128,4096")
    assert calibrate(file, "--where", "device=a", *STATED, "--out", out, *lines) == 0
    table = load_profile(str(out)).table
    assert table is not None
    assert table.decode.decodes == (1, 64, 256) and table.prompt.decodes == (0, 1, 64, 256)
    assert table.prompt.tokens == (128, 256, 512, 1024, 2048, 4096, 4352)


def test_like_keeps_all_that_is_not_fitted_or_given(tmp_path: Path) -> None:
    file = csv_of(tmp_path / "measured.csv", samples_of(TRUTH))
    out = tmp_path / "mine.json"
    assert calibrate(file, "--where", "device=a", "--like", "ascend-910b3", "--max-batch", 99, "--out", out) == 0
    like, profile = load_profile("ascend-910b3"), load_profile(str(out))
    assert (profile.source, profile.kv_capacity_tokens) == (like.source, like.kv_capacity_tokens)
    assert (profile.name, profile.max_batch, profile.table) == ("mine", 99, None)
    assert profile.coefficients.c1 == pytest.approx(TRUTH.c1, rel=1e-3)


def test_a_model_named_beside_like_gives_the_sizes(tmp_path: Path) -> None:
    file = csv_of(tmp_path / "measured.csv", samples_of(TRUTH))
    out = tmp_path / "mine.json"
    other = ("--model", "llama-2-70b", "--devices", 4, "--context-length", 2048)
    assert calibrate(file, "--where", "device=a", "--like", "h100-llama-3.1-8b", *other, "--out", out) == 0
    profile = load_profile(str(out))
    assert (profile.model, profile.device_kind, profile.price_per_hour) == ("llama-2-70b", "h100", None)
    assert (profile.kv_capacity_tokens, profile.context_length) == (409078, 2048)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give either FILE.csv with measurements, or --engine torch --model DIR"),
        (("FILE", "--engine", "torch"), "give either FILE.csv"),
        (("FILE",), "--model and --device-kind and --source missing: give them, or --like PROFILE"),
        (("FILE", *STATED, "--where", "device"), "--where 'device': write COLUMN=VALUE"),
        (("FILE", *STATED, "--where", "colour=red"), "no column 'colour' to select by; it has device, prefill_tokens"),
        (("FILE", *STATED, "--where", "device=c"), "no row has device=c; check --where"),
        (("FILE", *STATED, "--device-kind", "h1"), "the memory of 'h1' is not known; give --memory-gb"),
        (("FILE", *STATED, "--model", "gpt"), "--model 'gpt' is neither a directory with a config.json nor llama-3.1"),
        (("FILE", *STATED, "--memory-gb", "16"), "16.1 GB of weights leave no room for KV on 1 x 16 GB"),
        (("FILE", *STATED, "--price-per-hour", "2"), "--price-per-hour needs --price-source"),
        (("FILE", *STATED, "--max-batch", "0"), "mine.json: max_batch must be a whole number of at least 1, not 0"),
        (("none.csv", *STATED), "none.csv cannot be read: No such file"),
        (("--engine", "torch"), "--engine torch needs --model DIR"),
        (("--engine", "torch", "--model", "x", "--like", "ascend-910b3"), "--like and --where are for measurements"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = csv_of(tmp_path / "measured.csv", samples_of(TRUTH)[:20])
    given = [str(file) if text == "FILE" else text for text in arguments]
    assert calibrate(*given, "--out", tmp_path / "mine.json") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "mine.json").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", r"m\.csv:1: the columns a, b are of no known format; needed: chunk_size, p_len"),
        ("", r"m\.csv:1: the columns \(none\) are of no known format"),
        ("chunk_size,p_len,d_num,ctx_len,cost\n", r"m\.csv: no row below the header"),
        ("chunk_size,p_len,d_num,ctx_len,cost\n2,0,2,9,1\n2,0,2,9,x\n", r"m\.csv:3: cost is 'x', not a number"),
        ("chunk_size,p_len,d_num,ctx_len,cost\n2,0,-2,9,1\n", r"m\.csv:2: d_num is '-2', .* correct or remove the row"),
        ("chunk_size,p_len,d_num,ctx_len,cost\n2,0,2,9,0\n", r"m\.csv:2: cost is '0', not a number"),
        ("chunk_size,p_len,d_num,ctx_len,cost\n2,0,2\n", r"m\.csv:2: cost is '', not a number"),
    ],
)
def test_a_wrong_measurement_is_named_by_its_row(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_samples(file, {})


def test_ascend_rows_lie_on_lines_of_all_their_tokens_and_placeholders_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    file.write_text(
        "chunk_size,p_len,d_num,ctx_len,cost\n256,156,100,512,27\n8,0,8,512,15\n128,128,0,512,14\n128,128,0,1024,16\n"
        "128,128,0,2048,18\n4096,4000,96,512,200.0\n4096,4096,0,512,144.6\n"
    )
    mixed, decode, prompt, long = read_samples(file, {})
    assert mixed.lines == {"tokens": 256, "decodes": 100, "context": 512}
    assert (mixed.shape, mixed.seconds) == ((156, 156**2 / 2, 100, 51200), 0.027)
    assert (decode.regime, decode.lines) == ("decode", {"decodes": 8, "context": 512})
    # A prompt alone has no decodes whose context could matter: one shape, the median of its times.
    assert (prompt.regime, prompt.seconds, prompt.lines) == ("prefill", 0.016, {"tokens": 128})
    assert long.prefill_tokens == 4096


def test_splitwise_rows_give_a_prompt_batch_and_its_decodes(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    # 8,192 tokens were asked for; the end-to-end time says that there were 100.
    file.write_text(
        "prompt_size,batch_size,token_size,prompt_time,token_time,e2e_time\n512,4,8192,200,40,4200\n512,4,64,200,40,2760\n"
    )
    prompt, long, short = read_samples(file, {})
    assert (prompt.shape, prompt.seconds) == ((2048, 4 * 512**2 / 2, 0, 0), 0.2)
    assert (long.shape, long.seconds) == ((0, 0, 4, 4 * (512 + 50)), 0.04)
    assert short.kv_tokens == 4 * (512 + 32)


def test_sizes_of_public_models_are_the_published_ones() -> None:
    parameters = {"llama-3.1-8b": 8_030_261_248, "qwen3-32b": 32_762_123_264, "llama-2-70b": 68_976_648_192}
    assert {name: weight_bytes(shape) // 2 for name, shape in MODELS.items()} == parameters
    assert [kv_bytes_per_token(shape) for shape in MODELS.values()] == [131072, 262144, 327680]
    assert kv_capacity_tokens(MODELS["llama-2-70b"], 80.0, 4) == (4 * 68_000_000_000 - 2 * 68_976_648_192) // 327680


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_model_directory_s_size_is_that_of_its_tensors(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from hyperflexis.engines.torch.config import load_config
    from hyperflexis.engines.torch.weights import num_parameters
    from hyperflexis.make_model import Recipe, make_model

    make_model(tmp_path / "m", Recipe(size="1m", family=family))
    assert weight_bytes(find_shape(str(tmp_path / "m"))) == 4 * num_parameters(load_config(tmp_path / "m"))


def test_the_torch_engine_is_calibrated_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from hyperflexis.make_model import Recipe, make_model

    make_model(tmp_path / "m", Recipe(size="1m", context=256))
    limits = ("--rounds", 1, "--max-batch", 8, "--max-batch-tokens", 128)
    out = tmp_path / "here.json"
    assert calibrate("--engine", "torch", "--model", tmp_path / "m", *limits, "--out", out) == 0
    profile = load_profile(str(out))
    assert (profile.name, profile.model, profile.device_kind) == ("here", "m", "cpu")
    assert (profile.max_batch, profile.max_batch_tokens, profile.context_length) == (8, 128, 256)
    assert profile.domain.prefill_tokens == 128 and profile.domain.decodes == 8
    assert profile.weight_bytes == weight_bytes(find_shape(str(tmp_path / "m")))
    assert profile.iteration_s(128, 8192, 0, 0) > profile.iteration_s(16, 128, 0, 0) > 0.0
    assert "left-out lines" in capsys.readouterr().out


def test_live_shapes_fit_into_the_engine() -> None:
    pytest.importorskip("torch")
    from hyperflexis.calibrate_torch import shapes

    found = shapes(max_batch=16, max_batch_tokens=300, context_length=1000, kv_tokens=4000)
    assert {s.decodes for s in found} == {0, 1, 2, 3, 4, 6, 8, 12, 16}
    assert max(s.prefill for s in found) == 256
    for s in found:
        assert max(s.decode_context + 1, s.prefill_context + s.prefill) <= 1000
        assert s.decodes * (s.decode_context + 16) + s.prefill_context + s.prefill <= 4000


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(HyperFlexisError, match=r"calibrate needs scipy.*pip install 'hyperflexis\[report\]'"):
        fit(samples_of(TRUTH), ())
