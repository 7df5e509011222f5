"""Trains `kv-tiny`, the embedded model of kv_lm_eval, on two CPU cores in about an hour.

Why: a quick start and the tests need a model that loses something when its KV cache does. A randomly initialised model
has nothing to lose, and a language model of this size trained on text alone never learns to look anything up. So
the data is mostly retrieval: copying first (phase A: a repeated random string, from which the two-step "find the
earlier occurrence, take what followed" circuit forms in minutes), then needle episodes of growing length beside text
(phase B). To spare the model the slow discovery of that circuit's first step, the biases of layer 0 start with heads
that look one, two and three tokens back.

Reference: induction heads, arXiv:2209.11895; needle wording, RULER, arXiv:2404.06654 (kv_lm_eval/tiny/episodes.py).

Usage:
    torchrun --nproc_per_node 2 scripts/train_tiny.py --work_dir /tmp/kv_tiny [--text_dir FOLDER_OF_TXT] [--out FOLDER]
One single-threaded process per core, each with a share of every batch's rows: the sums are those of one process.
Without --text_dir the text is Python's help topics and grammar filler alone. The same command resumes from
WORK_DIR/last.pt. Rows are drawn from (seed, step), so that a resumed run sees the data of an unbroken one.

Output: a line of losses every 50 steps (nats per token; `answer` is the loss on what the needles hide), the model in
--out after every stage, and as the last line one JSON document with tokens, seconds, losses and the needle table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kv_lm_eval.tiny import episodes, path, topics
from kv_lm_eval.tiny.episodes import Draw, Needle

BOS, EOS, PAD = 0, 1, 2
SPECIAL = ["<s>", "</s>", "<pad>"]
VOCAB_SIZE = 2048
MAX_LR = 2e-3
WARMUP_STEPS = 100
FORMS = (episodes.MAGIC, episodes.MAGIC, episodes.CODE, episodes.BEST)
PIECES = r"""'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's, one digit at a time


@dataclass(frozen=True)
class Stage:
    """A stretch of training: `steps` steps of rows as long as one of `lengths` (tokens), drawn anew for each step."""

    name: str
    steps: int
    lengths: tuple[int, ...]
    tokens_per_step: int


STAGES = (
    Stage("copy", 700, (64,), 2048),
    Stage("128", 300, (128,), 4096),
    Stage("256", 300, (128, 256, 256, 256), 4096),
    Stage("512", 300, (256, 512, 512, 512), 8192),
    Stage("1024", 300, (256, 512, 1024, 1024, 1024), 8192),
    Stage("3072", 650, (512, 1024, 1024, 2048, 2048, 3072), 8192),
)


# ---------------------------------------------------------------------------------------------------------------- text
def read_texts(text_dir: str | None) -> list[str]:
    """Returns the .txt files below `text_dir`, hard-wrapped lines joined; test.txt stays unseen, for evaluation."""
    if text_dir is None:
        return []
    files = [file for file in sorted(Path(text_dir).rglob("*.txt")) if file.name != "test.txt"]
    return [re.sub(r"(?<!\n)\n(?!\n)", " ", file.read_text("utf-8", errors="ignore")) for file in files]


def train_tokenizer(texts: list[str], filler: list[str]) -> Tokenizer:
    """Byte-level BPE whose digits are single tokens, alone ("7") and after a space (" 7")."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    draw = Draw(0)
    facts = []
    for _ in range(1500):
        form = draw.pick(FORMS)
        for needle in episodes.needles(draw, 2, form=form):
            facts.append(f" {needle.statement}\n{episodes.question(needle, form)} {needle.value}.\n")
    digits = " 0 1 2 3 4 5 6 7 8 9" * 300
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, " ".join(filler), *facts, digits], trainer)
    return tokenizer


class Filler:
    """Consecutive sentences of one source, with their lengths in tokens."""

    def __init__(self, sentences: list[str], tokenizer: Tokenizer) -> None:
        counts = [len(e.ids) for e in tokenizer.encode_batch([" " + s for s in sentences], add_special_tokens=False)]
        kept = [(s, n) for s, n in zip(sentences, counts, strict=True) if 3 <= n <= 80]
        self.sentences = [s for s, _ in kept]
        self.ends = np.cumsum([n for _, n in kept])

    def run(self, draw: Draw, length: int) -> list[str]:
        """Returns as many sentences from a random place on as fit into `length` tokens."""
        last = int(np.searchsorted(self.ends, self.ends[-1] - length))
        start = draw.below(max(last, 1))
        before = self.ends[start - 1] if start else 0
        return self.sentences[start : int(np.searchsorted(self.ends, before + length, side="right"))]


class Data:
    """Draws training rows: copying, needle episodes and plain text."""

    def __init__(self, texts: list[str], help_texts: list[str], filler: list[str], tokenizer: Tokenizer) -> None:
        def split(documents: list[str]) -> list[str]:
            return [s for document in documents for s in re.split(r"(?<=[.!?:])\s+|\n\n+", document) if s]

        self.tokenizer = tokenizer
        sources = [filler, split(texts), split(help_texts)] if texts else [filler, split(help_texts)]
        self.fillers = [Filler(source, tokenizer) for source in sources]
        documents = [d for d in texts if len(d) > 2000] + help_texts
        encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
        self.stream = np.concatenate([[BOS, *e.ids, EOS] for e in encoded]).astype(np.int64)
        self.words = sorted({w for text in texts + help_texts for w in re.findall(r"\b[a-z]{4,9}\b", text)})

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def copying(self, draw: Draw, length: int) -> tuple[list[int], list[float]]:
        """A random string over a pool of 8 to 64 tokens, repeated to the end; only repetitions are scored."""
        pool = [len(SPECIAL) + draw.below(VOCAB_SIZE - len(SPECIAL)) for _ in range(8 + draw.below(57))]
        period = 8 + draw.below(length // 2 - 8)
        string = [draw.pick(pool) for _ in range(period)]
        ids = [BOS, *itertools.islice(itertools.cycle(string), length)]
        return ids, [0.0] * (period + 1) + [1.0] * (length - period)

    def text(self, draw: Draw, length: int) -> tuple[list[int], list[float]]:
        """A piece of the text stream, in three cases of four after a BOS."""
        start = draw.below(len(self.stream) - length - 1)
        piece = self.stream[start : start + length + 1].tolist()
        ids = [BOS, *piece[:-1]] if draw.below(4) else piece
        return ids, [0.0] + [1.0] * length

    def episode(self, draw: Draw, length: int) -> tuple[list[int], list[float]]:
        """Filler with 1 to 8 needles and questions for some of them; the answer's last part counts more."""
        form = draw.pick(FORMS)
        n = 1 + draw.below(3 if length < 256 else 8) if length > 128 else 1 + draw.below(2)
        asked = min(n, 1 + draw.below(max(1, length // 128)))
        keys = draw.sample(self.words, n) if draw.below(3) == 0 else episodes.KEYS
        needles = episodes.needles(draw, n, 4 + draw.below(4), keys, form)
        if form is episodes.BEST:
            needles = [self.with_words(draw, needle) for needle in needles]
        questions = [("\n\n" if i == 0 else "") + episodes.question(needles[i], form) for i in range(asked)]
        answers = [f" {needles[i].value}.\n" for i in range(asked)]
        tail_ids: list[int] = []
        tail_weights: list[float] = []
        answer_weight = 4.0 * max(1.0, length / 512)
        for asked_text, answer in zip(questions, answers, strict=True):
            for part, weight in ((asked_text, 1.0), (answer, answer_weight)):
                ids = self.encode(part)
                tail_ids += ids
                tail_weights += [weight] * len(ids)
        facts = sum(len(self.encode(" " + needle.statement)) for needle in needles)
        room = length - len(tail_ids) - facts - 1
        filler = draw.pick(self.fillers).run(draw, room) if room > 0 else []
        order = draw.sample(needles, n)
        depths = [draw.pick((0.0, 1.0, *(draw.uniform() for _ in range(4)))) for _ in order]  # the ends need practice
        hay = episodes.weave(filler, [needle.statement for needle in order], depths)
        head = ([BOS] if draw.below(3) else []) + self.encode(hay.text)
        ids = [*head, *tail_ids, EOS]
        return ids, [0.0] + [1.0] * (len(head) - 1) + tail_weights + [1.0]

    def with_words(self, draw: Draw, needle: Needle) -> Needle:
        """Replaces the number of a needle by some consecutive words of a text."""
        words = draw.pick(draw.pick(self.fillers).sentences).split()
        start = draw.below(max(1, len(words) - 4))
        value = " ".join(words[start : start + 3 + draw.below(8)]).rstrip(".,;:!?")
        return Needle(needle.key, value, episodes.BEST.statement.format(key=needle.key, value=value))

    def batch(self, seed: int, step: int, stage: Stage) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Returns ids [B, length + 1], the weight of predicting each of them, and each row's kind."""
        draw = Draw(seed * 1_000_003 + step)
        length = draw.pick(stage.lengths)
        n = stage.tokens_per_step // length
        ids = torch.full((n, length + 1), PAD)
        weights = torch.zeros(n, length + 1)
        kinds = []
        for row in range(n):
            u = (row + draw.uniform()) / n  # stratified: every batch holds each kind in about its share
            kind = "copying" if stage.name == "copy" or u < 0.15 else "text" if u < 0.5 else "episode"
            row_ids, row_weights = getattr(self, kind)(draw, length)
            row_ids, row_weights = row_ids[: length + 1], row_weights[: length + 1]
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            weights[row, : len(row_ids)] = torch.tensor(row_weights)
            kinds.append(kind)
        return ids, weights, kinds


# --------------------------------------------------------------------------------------------------------------- model
def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    look_back(model, strength=6.0)
    return model


def look_back(model: LlamaForCausalLM, strength: float) -> None:
    """Starts layer 0 with heads that attend 1, 2 and 3 tokens back: k is a constant, q that constant turned back.

    RoPE turns pair i of a vector at position p by the angle p * theta_i, so the score of positions (p, j) becomes the
    sum over i of cos((p - offset - j) * theta_i), largest at j = p - offset. The first query head of each KV head
    gets the bias; the second starts free.
    """
    attention = model.model.layers[0].self_attn
    frequency = model.model.rotary_emb.inv_freq
    half = len(frequency)
    kv_heads = model.config.num_key_value_heads or model.config.num_attention_heads
    group = model.config.num_attention_heads // kv_heads
    with torch.no_grad():
        for kv_head in range(kv_heads):
            angle = frequency * (kv_head + 1)
            key = attention.k_proj.bias.view(-1, 2, half)[kv_head]
            query = attention.q_proj.bias.view(-1, 2, half)[kv_head * group]
            key[0] = strength
            query[0] = strength * torch.cos(angle)
            query[1] = -strength * torch.sin(angle)


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Returns the cross entropy of ids[:, 1:] in nats, [B, length]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, biases and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MAX_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=MAX_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def add_gradients(model: LlamaForCausalLM) -> None:
    """Replaces every gradient by its sum over the processes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def learning_rate(step: int) -> float:
    """Warm-up, constant while copying, then a cosine down to 4 %."""
    first = STAGES[0].steps
    total = sum(stage.steps for stage in STAGES)
    done = max(0.0, (step - first) / (total - first))
    return MAX_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * done)))


# ---------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def needle_table(
    model: LlamaForCausalLM, data: Data, lengths: tuple[int, ...], samples: int, seed: int = 10**9
) -> dict[int, dict[float, float]]:
    """Returns, by length and depth, the share of numbers (of 4 in a text) whose every token is the likeliest."""
    table: dict[int, dict[float, float]] = {}
    for length in lengths:
        table[length] = {}
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
            hits = 0
            for sample in range(samples):
                draw = Draw(seed + sample + 1000 * int(100 * depth) + 10**6 * length)
                needles = episodes.needles(draw, 4)
                filler = data.fillers[sample % len(data.fillers)].run(draw, length - 130)
                depths = [depth, *(draw.uniform() for _ in needles[1:])]
                hay = episodes.weave(filler, [needle.statement for needle in needles], depths)
                answer = data.encode(f" {needles[0].value}.")
                ids = [BOS, *data.encode(f"{hay.text}\n\n{episodes.question(needles[0])}"), *answer]
                logits = model(torch.tensor([ids[:-1]]), logits_to_keep=len(answer)).logits[0]
                hits += logits.argmax(-1).tolist() == answer
            table[length][depth] = hits / samples
    return table


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, out: str) -> None:
    """Writes bf16 weights, configuration and tokenizer."""
    exported = LlamaForCausalLM(model.config)
    exported.load_state_dict(model.state_dict())
    exported.bfloat16().save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


# ------------------------------------------------------------------------------------------------------------ training
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work_dir", required=True, help="checkpoints, outside the repository")
    parser.add_argument("--text_dir", help="folder of English .txt files to train on (default: none)")
    parser.add_argument("--out", default=path(), help="where the model goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    work_dir = Path(args.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    texts, help_texts = read_texts(args.text_dir), topics.training()
    filler = list(itertools.islice(episodes.grammar_sentences(Draw(args.seed)), 40_000))
    tokenizer_file = work_dir / "tokenizer.json"
    if rank == 0 and not tokenizer_file.exists():
        train_tokenizer(texts + help_texts, filler).save(str(tokenizer_file))
    dist.barrier()
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    data = Data(texts, help_texts, filler, tokenizer)
    print(f"text: {len(data.stream):,} tokens; fillers: {[int(f.ends[-1]) for f in data.fillers]} tokens", flush=True)

    model = new_model()
    optimizer_list = optimizers(model)
    step, tokens, seconds, log = 0, 0, 0.0, []
    checkpoint = work_dir / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizer_list, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, seconds, log = state["step"], state["tokens"], state["seconds"], state["log"]
    losses_of = torch.compile(token_losses, dynamic=False)

    began = 0
    for stage in STAGES:
        ends = began + stage.steps
        sums: dict[str, list[float]] = {}
        while began <= step < ends:
            start = time.perf_counter()
            for optimizer in optimizer_list:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
            ids, weights, kinds = data.batch(args.seed, step, stage)
            scale = weights.sum()  # of all rows; the ranks' gradients are then simply added up
            ids, weights, kinds = ids[rank::world_size], weights[rank::world_size, 1:], kinds[rank::world_size]
            losses = losses_of(model, ids)
            ((losses * weights).sum() / scale).backward()
            add_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizer_list:
                optimizer.step()
                optimizer.zero_grad()
            step, tokens, seconds = step + 1, tokens + ids.numel() * world_size, seconds + time.perf_counter() - start
            with torch.no_grad():
                sums.setdefault("answer", []).extend(losses[weights > 1].tolist())
                for kind in set(kinds):
                    rows = torch.tensor([k == kind for k in kinds])
                    sums.setdefault(kind, []).extend(losses[rows][weights[rows] > 0].tolist())
            if rank == 0 and (step % 50 == 0 or step == ends):
                means = {kind: round(float(np.mean(values)), 3) for kind, values in sorted(sums.items()) if values}
                log.append({"step": step, "stage": stage.name, "tokens": tokens, "seconds": round(seconds), **means})
                print(json.dumps(log[-1]), f"{tokens / seconds:,.0f} tokens/s", flush=True)
                sums = {}
            if rank == 0 and (step % 100 == 0 or step == ends):
                saved = [optimizer.state_dict() for optimizer in optimizer_list]
                state = {"model": model.state_dict(), "optimizers": saved, "step": step, "tokens": tokens}
                torch.save({**state, "seconds": seconds, "log": log}, checkpoint)
            if rank == 0 and step == ends:
                export(model, tokenizer, args.out)
                if stage.name != "copy":
                    print(stage.name, needle_table(model, data, stage.lengths[-1:], 6), flush=True)
        began = ends

    if rank == 0:
        table = needle_table(model, data, (256, 512, 1024, 1536, 2048, 3072), samples=20)
        print(json.dumps({"tokens": tokens, "seconds": round(seconds), "log": log[-1], "needles": table}))
    dist.destroy_process_group()
