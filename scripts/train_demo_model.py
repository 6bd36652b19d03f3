"""Trains the tiny language model that the package carries, and gives it outlier channels.

    python scripts/train_demo_model.py --out DIR

Everything comes from seeds: the text from `fewbit.demo.text`, the weights from SEED below. No data
set, no network. The result is an ordinary transformers directory (Llama, fp16) of under 3 MB.

Large models have a few activation channels that are far larger than the rest; a model of this size
does not grow them. They are the reason why AWQ and SmoothQuant exist, so this script PUTS THEM IN
by a rescaling that does not change the function: at each norm in the decoder layers the gain of a
few channels is multiplied by a random factor, and the matching columns of the linears that read
this norm are divided by it. These columns carry most of the signal and are now the smallest of
their rows, so 4-bit round-to-nearest loses them. The function is what training found; the outliers
are ours.

At the end the script prints what it reached on held-out text: perplexity against unigram and
bigram, then after 4-bit round-to-nearest, with the outliers and with them undone before rounding.
"""

import argparse
import copy
import importlib.util
import json
import math
import time
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

SEED = 20
THREADS = 1  # sums split over more threads round differently: other weights, equally good

VOCABULARY = 512
HIDDEN = 128
TOKENIZER_CHARACTERS = 1_000_000
TRAIN_CHARACTERS = 6_500_000  # read once
BATCH = 4  # rows in a step
LENGTH = 512  # tokens in a row, and the longest context of the model
WARMUP = 50  # steps
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1

OUTLIERS_PER_NORM = 10  # of HIDDEN; so small a model spreads its signal, fewer are hardly missed
OUTLIER_FACTORS = (20.0, 60.0)

BASELINE_CHARACTERS = 2_000_000
HELD_OUT_CHARACTERS = 60_000
WINDOW = 256  # tokens that one evaluation window predicts from
BEGIN, END = "<s>", "</s>"


def load_text() -> ModuleType:
    """fewbit.demo.text, by its path: training needs no built package."""
    path = Path(__file__).parents[1] / "python" / "fewbit" / "demo" / "text.py"
    spec = importlib.util.spec_from_file_location("text", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


text = load_text()


# --- tokens ---------------------------------------------------------------------------------------

def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: <s>, </s>, the 256 bytes and 254 merges. No text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BEGIN, END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([text.generate(text.TRAIN_SEED, TOKENIZER_CHARACTERS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END,
        model_max_length=LENGTH, clean_up_tokenization_spaces=False)


def encode(tokenizer: PreTrainedTokenizerFast, written: str) -> torch.Tensor:
    """int64 [tokens]"""
    return torch.tensor(tokenizer.backend_tokenizer.encode(written).ids)


def training_rows(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """int64 [rows, LENGTH], shuffled; every other row begins with <s>, so both starts are known.

    Stories are parted by empty lines and cut anywhere. </s> stays unused: generation may stop at
    the empty line instead.
    """
    stream = encode(tokenizer, text.generate(text.TRAIN_SEED, TRAIN_CHARACTERS))
    rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows))]
    rows[::2, 0] = tokenizer.bos_token_id
    return rows


# --- training -------------------------------------------------------------------------------------

def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=384, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=LENGTH,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / (steps - WARMUP)
    return LEARNING_RATE * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def loss_on(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean nats per token that a row's earlier tokens leave open; rows int64 [batch, length]."""
    logits = model(rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train_(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    """One pass of AdamW over rows [rows, LENGTH]. Weight decay spares the norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY},
         {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True)
    steps, start = len(rows) // BATCH, time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_on(model, rows[step * BATCH : (step + 1) * BATCH])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.process_time() - start
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {seconds:.0f} CPU s", flush=True)


# --- outliers -------------------------------------------------------------------------------------

def norm_edges(model: LlamaForCausalLM) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """(norm, the linears that read its output), two for each decoder layer."""
    edges = []
    for layer in model.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        edges.append((layer.input_layernorm, [attn.q_proj, attn.k_proj, attn.v_proj]))
        edges.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    return edges


@torch.no_grad()
def channel_energy(model: LlamaForCausalLM, rows: torch.Tensor) -> list[torch.Tensor]:
    """Per norm edge [hidden]: mean x_c^2 times the squared length of the columns that read it."""
    energies, hooks = [], []

    def keep(readers: list[nn.Linear]):
        def hook(_module: nn.Module, _inputs: tuple, x: torch.Tensor) -> None:
            columns = sum(linear.weight.square().sum(0) for linear in readers)
            energies.append(x.square().mean((0, 1)) * columns)
        return hook

    for norm, readers in norm_edges(model):
        hooks.append(norm.register_forward_hook(keep(readers)))
    model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return energies


def choose_outliers(model: LlamaForCausalLM, rows: torch.Tensor) -> list[torch.Tensor]:
    """Per norm edge the factors [hidden]: random at the channels of most energy, else 1."""
    low, high = OUTLIER_FACTORS
    factors = []
    for energy in channel_energy(model, rows):
        chosen = energy.topk(OUTLIERS_PER_NORM).indices
        factor = torch.ones_like(energy)
        factor[chosen] = low + (high - low) * torch.rand(OUTLIERS_PER_NORM)
        factors.append(factor)
    return factors


@torch.no_grad()
def add_outliers_(model: LlamaForCausalLM, factors: list[torch.Tensor]) -> None:
    """gain *= factor at the norm, columns /= factor at its readers: the same function."""
    for (norm, readers), factor in zip(norm_edges(model), factors, strict=True):
        norm.weight.mul_(factor)
        for linear in readers:
            linear.weight.div_(factor)


def in_fp64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy that is fp64 throughout; transformers' own norm rounds to fp32 inside."""
    model = copy.deepcopy(model).double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(HIDDEN, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


@torch.no_grad()
def check_same_function(model: LlamaForCausalLM, factors: list[torch.Tensor],
                        rows: torch.Tensor) -> float:
    """Largest change of a logit in fp64; an error beyond 1e-9."""
    exact = in_fp64(model)
    before = exact(rows, use_cache=False).logits
    add_outliers_(exact, [factor.double() for factor in factors])
    change = (exact(rows, use_cache=False).logits - before).abs().max().item()
    if not change <= 1e-9:
        raise RuntimeError(f"the outliers move a logit by {change:.1e}, allowed is 1e-9")
    return change


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """An ordinary transformers directory."""
    model.generation_config.pad_token_id = tokenizer.pad_token_id  # else generate() asks for it
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # The class name that transformers 4 and 5 both know.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n")
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read


# --- report ---------------------------------------------------------------------------------------

def baselines(seen: torch.Tensor, held_out: torch.Tensor) -> tuple[float, float]:
    """Perplexity of unigram and bigram, each count begun at 0.01; both int64 [tokens]."""
    pairs = torch.full((VOCABULARY, VOCABULARY), 0.01, dtype=torch.float64)
    pairs.view(-1).index_add_(0, seen[:-1] * VOCABULARY + seen[1:],
                              torch.ones(len(seen) - 1, dtype=torch.float64))
    single = pairs.sum(0).log() - pairs.sum().log()
    double = pairs.log() - pairs.sum(1, keepdim=True).log()
    previous, following = held_out[:-1], held_out[1:]
    return (math.exp(-single[following].mean()), math.exp(-double[previous, following].mean()))


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor) -> float:
    """Over windows of WINDOW tokens that do not overlap; the first of each is only context."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    return math.exp(sum(loss_on(model, row[None]).item() for row in windows) / len(windows))


def round_to_nearest(w: torch.Tensor, bits: int = 4, group_size: int = 128) -> torch.Tensor:
    """w [out, in] on the asymmetric grid of each group; the range is extended to hold 0."""
    groups = w.reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    zero_point = (-low / scale).round()
    q = ((groups / scale).round() + zero_point).clamp(0, 2**bits - 1)
    return ((q - zero_point) * scale).view_as(w)


@torch.no_grad()
def rounded(model: LlamaForCausalLM, factors: list[torch.Tensor]) -> LlamaForCausalLM:
    """A copy with its decoder linears at 4 bits; while rounding, columns are times the factors."""
    model = copy.deepcopy(model)
    factor_of = {id(linear): factor
                 for (_, readers), factor in zip(norm_edges(model), factors, strict=True)
                 for linear in readers}
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            factor = factor_of.get(id(module), 1)
            module.weight.copy_(round_to_nearest(module.weight * factor) / factor)
    return model


def print_report(trained: nn.Module, saved: LlamaForCausalLM, factors: list[torch.Tensor],
                 seen: torch.Tensor, held_out: torch.Tensor) -> None:
    unigram, bigram = baselines(seen, held_out)
    ones = [torch.ones(HIDDEN)] * len(factors)
    print(f"held-out text, seed {text.EVALUATION_SEED}, {len(held_out)} tokens, "
          f"windows of {WINDOW}; perplexity of")
    for name, value in (
            ("unigram", unigram),
            ("bigram", bigram),
            ("trained model, fp32", perplexity(trained, held_out)),
            ("saved model, fp16 with outliers", perplexity(saved, held_out)),
            ("  4-bit round-to-nearest", perplexity(rounded(saved, ones), held_out)),
            ("  the same, outliers undone", perplexity(rounded(saved, factors), held_out))):
        print(f"{name:34}{value:9.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    out = parser.parse_args().out

    disable_progress_bar()
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)

    tokenizer = train_tokenizer()
    rows = training_rows(tokenizer)
    model = new_model(tokenizer)
    train_(model, rows)
    model.eval()

    probe = encode(tokenizer, text.generate(text.CALIBRATION_SEED, 20_000))
    probe = probe[: 8 * LENGTH].view(8, LENGTH)
    factors = choose_outliers(model, probe)
    change = check_same_function(model, factors, probe)
    print(f"outliers: {OUTLIERS_PER_NORM} per norm, fp64 logits move by {change:.1e}")

    trained = copy.deepcopy(model)
    add_outliers_(model, factors)
    save(model.half(), tokenizer, out)
    print_report(
        trained, model.float(), factors,
        seen=encode(tokenizer, text.generate(text.TRAIN_SEED, BASELINE_CHARACTERS)),
        held_out=encode(tokenizer, text.generate(text.EVALUATION_SEED, HELD_OUT_CHARACTERS)))
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
