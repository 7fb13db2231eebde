"""A random-weight model with its tokenizer, made locally: everything runs with no download.

The weights have a standard deviation of 0.2 and the embeddings are not tied. With the usual 0.02 and tied embeddings a
random model repeats one token whatever its context is, which would hide faults of the KV cache. The tokenizer is a
byte-level BPE trained on text generated here, so a seed gives the same model on every machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from .errors import HyperFlexisError

MARK = "make_model.json"
"""The file in which a directory of ours says how it was made."""
STD = 0.2
ALIGN = 64
"""Vocabularies are a multiple of this, as matrix kernels like them."""
SMALLEST_VOCAB = 320
"""256 bytes and the special tokens, aligned."""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
"""Their names in safetensors files, and bytes an element."""


@dataclass(frozen=True, slots=True)
class Size:
    """Widths of a model. The larger ones have four query heads to a key head, as the families' own have."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int


SIZES = {
    "1m": Size(hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, inner=256, vocab=1024),
    "20m": Size(hidden=384, layers=8, heads=8, kv_heads=2, head_dim=64, inner=1024, vocab=8192),
    "100m": Size(hidden=768, layers=12, heads=12, kv_heads=3, head_dim=64, inner=2048, vocab=16384),
    "270m": Size(hidden=1024, layers=21, heads=16, kv_heads=4, head_dim=64, inner=2816, vocab=16384),
    "1b": Size(hidden=2048, layers=23, heads=32, kv_heads=8, head_dim=64, inner=5632, vocab=16384),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a made model depends on."""

    size: str = "20m"
    family: str = "llama"
    seed: int = 0
    vocab: int | None = None
    context: int = 8192
    dtype: str = "float32"
    shards: int = 1
    layers: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    default = Recipe()
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write the model")
    parser.add_argument("--size", choices=SIZES, default=default.size, help="parameters (default: %(default)s)")
    parser.add_argument("--family", choices=ARCHITECTURES, default=default.family, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the weights (default: %(default)s)")
    parser.add_argument("--vocab", type=int, metavar="N", help=f"tokens, a multiple of {ALIGN}")
    parser.add_argument("--context", type=int, default=default.context, metavar="N", help="default: %(default)s tokens")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="default: %(default)s")
    parser.add_argument("--layers", type=int, metavar="N", help="default: the size's own")
    parser.add_argument("--shards", type=int, default=default.shards, metavar="N", help="weight files (default: 1)")


def main(args: argparse.Namespace) -> int:
    """Run the command; raises HyperFlexisError for what the user has to change."""
    recipe = Recipe(args.size, args.family, args.seed, args.vocab, args.context, args.dtype, args.shards, args.layers)
    directory: Path = args.directory
    if make_model(directory, recipe):
        print(
            f"made a {recipe.size} {recipe.family} model in {directory}: try hyperflexis instance --model {directory}"
        )
    else:
        print(f"{directory} already holds this model; nothing to do")
    return 0


def make_model(directory: Path, recipe: Recipe) -> bool:
    """Write the model. False when ``directory`` already holds the same one.

    Raises HyperFlexisError for a directory that holds something else, and for values out of range.
    """
    size, vocab = _size(recipe), _vocab(recipe)
    if recipe.context < 16:
        raise HyperFlexisError(f"--context {recipe.context} is too short; give at least 16")
    if not 1 <= recipe.shards <= size.layers:
        raise HyperFlexisError(f"--shards {recipe.shards} is out of range; give 1 to {size.layers}")
    if recipe.seed < 0:
        raise HyperFlexisError(f"--seed {recipe.seed} is negative; give 0 or more")
    fields = {name: getattr(recipe, name) for name in Recipe.__slots__}
    if recipe.layers is None:
        del fields["layers"]  # models were made before there was a choice
    mark = json.dumps({"recipe": fields, "format": 1}, indent=1)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        found = directory / MARK
        if found.is_file() and found.read_text() == mark:
            return False
        what = "holds a model made with other arguments" if found.is_file() else "exists and is no model made by this"
        raise HyperFlexisError(f"{directory} {what}; give another directory or remove it")
    # Built beside its place and moved there whole: an interrupted run leaves no half model under the name.
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_tokenizer(partial, vocab, recipe.context)
        _write_configs(partial, recipe, size, vocab)
        _write_weights(partial, recipe, size, vocab)
        (partial / MARK).write_text(mark)
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise HyperFlexisError(f"{directory} cannot be written ({error}); is the disk full?") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def num_bytes(recipe: Recipe) -> int:
    """Of a model's weights. Raises HyperFlexisError for values out of range."""
    groups = _shapes(recipe.family, _size(recipe), _vocab(recipe))
    return sum(prod(shape) for group in groups for shape in group.values()) * DTYPES[recipe.dtype][1]


def _size(recipe: Recipe) -> Size:
    size = SIZES[recipe.size]
    if recipe.layers is None:
        return size
    if recipe.layers < 1:
        raise HyperFlexisError(f"--layers {recipe.layers} is too few; give 1 or more")
    return replace(size, layers=recipe.layers)


def _vocab(recipe: Recipe) -> int:
    vocab = recipe.vocab or SIZES[recipe.size].vocab
    most = SIZES["100m"].vocab
    if vocab % ALIGN or not SMALLEST_VOCAB <= vocab <= most:
        raise HyperFlexisError(f"--vocab {vocab} must be a multiple of {ALIGN} from {SMALLEST_VOCAB} to {most}")
    return vocab


def _write_configs(directory: Path, recipe: Recipe, size: Size, vocab: int) -> None:
    ends = [vocab - len(SPECIAL_TOKENS), vocab - 1]  # <|endoftext|> and <|im_end|>
    config: dict[str, object] = {
        "architectures": [ARCHITECTURES[recipe.family]],
        "model_type": recipe.family,
        "vocab_size": vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": recipe.context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "initializer_range": STD,
        "bos_token_id": ends[0],
        "eos_token_id": ends[1],
        "torch_dtype": recipe.dtype,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": ends[0], "eos_token_id": ends[::-1]})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _shapes(family: str, size: Size, vocab: int) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of all tensors: one group a layer, what is outside the layers in the first group."""
    q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    groups = []
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        group: dict[str, tuple[int, ...]] = {
            layer + "input_layernorm.weight": (size.hidden,),
            layer + "post_attention_layernorm.weight": (size.hidden,),
            layer + "self_attn.q_proj.weight": (q, size.hidden),
            layer + "self_attn.k_proj.weight": (kv, size.hidden),
            layer + "self_attn.v_proj.weight": (kv, size.hidden),
            layer + "self_attn.o_proj.weight": (size.hidden, q),
            layer + "mlp.gate_proj.weight": (size.inner, size.hidden),
            layer + "mlp.up_proj.weight": (size.inner, size.hidden),
            layer + "mlp.down_proj.weight": (size.hidden, size.inner),
        }
        if family == "qwen2":
            group |= {f"{layer}self_attn.{name}_proj.bias": (n,) for name, n in (("q", q), ("k", kv), ("v", kv))}
        if family == "qwen3":
            group |= {f"{layer}self_attn.{name}_norm.weight": (size.head_dim,) for name in "qk"}
        groups.append(group)
    groups[0] |= {
        "model.embed_tokens.weight": (vocab, size.hidden),
        "model.norm.weight": (size.hidden,),
        "lm_head.weight": (vocab, size.hidden),
    }
    return groups


def _write_weights(directory: Path, recipe: Recipe, size: Size, vocab: int) -> None:
    import numpy  # here, so that the command line does without until a model is made

    random = numpy.random.default_rng(recipe.seed)

    def tensor(name: str, shape: tuple[int, ...]) -> bytes:
        if name.endswith("norm.weight"):
            values = numpy.ones(shape, numpy.float32)
        else:
            values = random.standard_normal(shape, numpy.float32) * numpy.float32(STD)
        if recipe.dtype == "float32":
            return values.tobytes()
        # bfloat16, which numpy has not: the upper half of a float32, rounded to even.
        bits = values.view(numpy.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16).tobytes()

    groups = _shapes(recipe.family, size, vocab)
    where: dict[str, str] = {}
    for shard in range(recipe.shards):
        file = f"model-{shard + 1:05}-of-{recipe.shards:05}.safetensors" if recipe.shards > 1 else "model.safetensors"
        first, last = (n * len(groups) // recipe.shards for n in (shard, shard + 1))
        shapes = {name: shape for group in groups[first:last] for name, shape in group.items()}
        where |= dict.fromkeys(shapes, file)
        _write_safetensors(directory / file, recipe.dtype, shapes, tensor)
    if recipe.shards > 1:
        size_b = sum(prod(shape) for group in groups for shape in group.values()) * DTYPES[recipe.dtype][1]
        index = {"metadata": {"total_size": size_b}, "weight_map": where}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_safetensors(
    path: Path, dtype: str, shapes: dict[str, tuple[int, ...]], tensor: Callable[[str, tuple[int, ...]], bytes]
) -> None:
    """The format itself is simple: a length, a JSON header padded to eight bytes, the tensors one after the other."""
    name_of_dtype, item_b = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + prod(shape) * item_b
        header[name] = {"dtype": name_of_dtype, "shape": shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(tensor(name, shape))


def _write_tokenizer(directory: Path, vocab: int, context: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(vocab), trainer)
    # Last, so that their ids are known without the tokenizer.
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    assert tokenizer.get_vocab_size() == vocab, tokenizer.get_vocab_size()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", config)


# Common words in full, most common first, and parts from which longer ones are built. Enough different words for the
# largest vocabulary here; what a merge looks like matters, what the words mean does not.
_COMMON = """
the of and to a in is that it for was on are as with his they be at one have this from or had by not but what all were
we when your can said there use an each which she do how their if will up other about out many then them these so some
her would make like him into time has look two more write go see number no way could people my than first water been
call who oil its now find long down day did get come made may part over new sound take only little work know place year
live me back give most very after thing our just name good sentence man think say great where help through much before
line right too mean old any same tell boy follow came want show also around form three small set put end does another
well large must big even such because turn here why ask went men read need land different home us move try kind hand
picture again change off play spell air away animal house point page letter mother answer found study still learn should
world high every near add food between own below country plant last school father keep tree never start city earth eye
light thought head under story saw left few while along might close something seem next hard open example begin life
always those both paper together got group often run important until children side feet car mile night walk white sea
began grow took river four carry state once book hear stop without second later miss idea enough eat face watch far
really almost let above girl sometimes mountain cut young talk soon list song being leave family body music color
def return self import class None True False for while else elif with print range len str int list dict raise assert
lambda yield async await const function let var static public void new null true false struct impl fn match use pub
request response token model server client latency deadline budget batch prefill decode cache weight layer memory queue
"""
_ROOTS = """
act port form press duct spect scrib tract vert ject mit tend vent pos sist cept cid claim clud cord cred cur fect fer
fin flect flow frag gen grad graph gress hab jud lab lect loc log man mark meas mem merg min mod mot nat norm not num
oper ord pac part path pend plic point pol pop prim prob quest quir rad rat reg rupt sci sect sens serv sign sim solv
son spir stan strict struct sum tain tech temp term test text tim ton tort trac turn typ uni val var vid vis viv voc
vol ward warm wave weigh wind wood word work yield build brand bright broad burn cast catch chain charm clean clear
climb cloud coast count cover craft cross dance dream drift drink drive earn field fight float force frame fresh front
garden glass grain grand grass green ground guard guide heart heavy horse human hunt judge jump laugh learn level
light limit march metal money month motor mount mouth north ocean order paint panel paper party peace phone piece
pilot place plain plane plate point pound power price pride print prize proof quick quiet radio raise range reach
ready right river rough round route royal scale scene scope score sense serve shade shape share sharp sheet shelf
shell shift shine shock shore short skill sleep slide smart smile smoke solid solve sound south space spare speak
speed spend spirit split sport spread stage stamp stand start steam steel steep stick stock stone store storm story
strip study style sugar sweet table taste teach thank theme thick think tight tower trace track trade train treat
trend trial trust truth twist value visit voice
"""
_PREFIXES = "re un in dis over under pre mis sub inter trans super out fore anti counter non semi mid ex de en up"
_SUFFIXES = "s ed ing er ers ion ions able ment ness ful less ly al ive ity ous ist ism ize ized ance ence ary ory"


def _corpus(vocab: int) -> Iterator[str]:
    """Words with falling frequency, then built ones, each once or a few times, in an order that a fixed generator
    gives."""
    prefixes, roots, suffixes = ["", *_PREFIXES.split()], _ROOTS.split(), ["", *_SUFFIXES.split()]
    for rank, word in enumerate(_COMMON.split()):
        repeats = 20000 // (rank + 10)
        yield f" {word}" * repeats
        yield f"{word.capitalize()} {word}\n" * (repeats // 8 + 1)
    state = 1
    for _ in range(4 * vocab):
        state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        high = state >> 33
        prefix, root = prefixes[high % len(prefixes)], roots[(high >> 5) % len(roots)]
        yield f" {prefix}{root}{suffixes[(high >> 16) % len(suffixes)]}"
    for n in range(1000):
        yield f" {n}, {n}.{n % 10}\n    x{n} = f(y[{n}])\n"
