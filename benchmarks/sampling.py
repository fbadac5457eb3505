"""Reads nothing, writes nothing but a table: the generation engine against the official loop, and guidance-free against
guided sampling, in images/s.

    python benchmarks/sampling.py > benchmarks/results/sampling_2cpu.md
    python benchmarks/sampling.py --shapes digits

Random weights in the shape of the released LlamaGen-B at 256 px and of the embedded default: speed does not depend on
their values. The official loop is written plainly: a KV cache of full length that is read as a whole at every step
under a mask, PyTorch's linear layers, a sample drawn by multinomial. On the same backend means that both loops have
the same linear layers. Lines take turns, --repeats times, and the medians count. Tokens only; image decoding by a
decoder in the shape of VQ-16 is timed by itself and added for the end to end ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cca_core.generate import Sampling, decode_images, generate
from cca_core.models import family
from cca_core.models.llamagen import slots
from cca_core.models.llamagen.network import LlamaGen, LlamaGenSpec, rotate
from cca_core.models.llamagen.tokenizer import VQTokenizer
from cca_core.models.packed import Linear, packed_linear

GOAL_ALL_IN, GOAL_SAME_BACKEND, GOAL_FREE = 3.5, 1.5, 1.9
BATCHES = {"B": (4, 16), "digits": (4, 16, 64, 256)}
#: Images at once that are tried for the best batch of each kind of sampling.
BEST_OF = {"B": (16, 64), "digits": (256, 1024)}
GUIDED = Sampling(cfg_scale=2.0)
OFFICIAL, ENGINE = "official loop", "engine"


def build(shape: str) -> LlamaGen:
    llamagen = family("llamagen")
    spec = (
        llamagen.released.model_spec("GPT-B", 256)
        if shape == "B"
        else LlamaGenSpec(
            vocab_size=64,
            num_tokens=16,
            num_classes=10,
            dim=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            ffn_dim=512,
        )
    )
    model = llamagen.build_model(spec)
    model.init_weights(torch.Generator().manual_seed(0))
    nn.init.normal_(model.output.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    return model.eval()


class OfficialLoop:
    """Guidance-free sampling as the official code does it, on the modules of the model; ``packed_for`` that many rows,
    with the engine's linear layers."""

    def __init__(self, model: LlamaGen, packed_for: int = 0) -> None:
        self.model = model
        linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
        self.maps: dict[nn.Linear, Linear] = {
            part: packed_linear(part, rows=packed_for) if packed_for else part for part in linears
        }
        length = model.spec.num_tokens
        self.mask = torch.tril(torch.ones(length, length, dtype=torch.bool))

    @torch.no_grad()
    def __call__(self, classes_B: Tensor) -> Tensor:
        model, spec = self.model, self.model.spec
        shape = (len(classes_B), spec.num_heads, spec.num_tokens, spec.head_dim)
        caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in model.layers]
        x = model.cls_embedding.embedding_table(classes_B)[:, None]
        drawn = []
        for position in range(spec.num_tokens):
            table = model.rotary[position : position + 1]
            for layer, (keys, values) in zip(model.layers, caches, strict=True):
                x = self._block(layer, x, table, keys, values, position)
            probs = (self.maps[model.output](model.norm(x))[:, -1].float()).softmax(-1)
            drawn.append(torch.multinomial(probs, 1))
            x = model.tok_embeddings(drawn[-1])
        return torch.cat(drawn, dim=1)

    def _block(self, layer: nn.Module, x: Tensor, table: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        heads, maps, ffn = self.model.spec.num_heads, self.maps, layer.feed_forward
        q, k, v = maps[layer.attention.wqkv](layer.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, table), rotate(k, table), v))
        keys[:, :, position : position + 1] = k
        values[:, :, position : position + 1] = v
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask[None, None, position : position + 1])
        x = x + maps[layer.attention.wo](out.transpose(1, 2).flatten(2))
        hidden = layer.ffn_norm(x)
        return x + maps[ffn.w2](F.silu(maps[ffn.w1](hidden)) * maps[ffn.w3](hidden))


def same_backend(*maps: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """PyTorch's own linear layers in the place of packed ones."""
    del rows
    return lambda x: torch.cat([part(x) for part in maps], dim=-1) if len(maps) > 1 else maps[0](x)


def medians(lines: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each, taken in turn after one call each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for repeat in range(repeats + 1):
        for name, run in lines.items():
            started = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def against_official(shape: str, repeats: int) -> None:
    model = build(shape)
    official = OfficialLoop(model)
    plain_model = build(shape)  # of its own: packed weights are kept by model
    half = build(shape).to(torch.bfloat16)
    print(f"\n## {shape}: the engine against the official loop, guidance-free, tokens only\n")
    print("| images at once | line | seconds | images/s | times official |\n| ---: | --- | ---: | ---: | ---: |")
    against: list[str] = []
    for batch in BATCHES[shape]:
        classes, seeds = torch.arange(batch) % model.spec.num_classes, torch.arange(batch)

        def plain(classes: Tensor = classes, seeds: Tensor = seeds, batch: int = batch) -> None:
            with mock.patch.object(slots, "packed_linear", same_backend):
                generate(plain_model, classes, Sampling(), seeds, batch_size=batch)

        def packed(
            model: LlamaGen, classes: Tensor = classes, seeds: Tensor = seeds, batch: int = batch
        ) -> Callable[[], object]:
            return lambda: generate(model, classes, Sampling(), seeds, batch_size=batch)

        official_packed = OfficialLoop(model, packed_for=batch)
        lines = {
            OFFICIAL: lambda classes=classes: official(classes),
            f"{OFFICIAL}, packed linear layers": lambda classes=classes, loop=official_packed: loop(classes),
            f"{ENGINE}, PyTorch's linear layers": plain,
            f"{ENGINE}, packed linear layers": packed(model),
            f"{ENGINE}, all in: packed linear layers, bfloat16": packed(half),
        }
        found = medians(lines, repeats)
        first = found[OFFICIAL]
        for name, seconds in found.items():
            print(f"| {batch} | {name} | {seconds:.2f} | {batch / seconds:.2f} | {first / seconds:.2f} |", flush=True)
        same = [found[f"{OFFICIAL}, packed linear layers"] / found[f"{ENGINE}, packed linear layers"]]
        same.append(first / found[f"{ENGINE}, PyTorch's linear layers"])
        against.append(f"{batch} at once, same backend: {same[0]:.2f} packed, {same[1]:.2f} PyTorch's linear layers.")
    print("\n" + "\n".join(against))


def free_against_guided(shape: str, repeats: int, decode_s: float) -> None:
    model = build(shape)
    lines: dict[str, Callable[[], object]] = {}
    images: dict[str, int] = {}
    for kind, sampling in (("guidance-free", Sampling()), ("guided", GUIDED)):
        for batch in BEST_OF[shape]:
            name = f"{kind}, {batch} at once"
            classes, seeds = torch.arange(batch) % model.spec.num_classes, torch.arange(batch)
            lines[name] = lambda c=classes, s=seeds, b=batch, p=sampling: generate(model, c, p, s, batch_size=b)
            images[name] = batch
    found = {name: images[name] / seconds for name, seconds in medians(lines, repeats).items()}
    print(f"\n## {shape}: guidance-free against guided, same engine\n")
    print("| line | images/s, tokens only |\n| --- | ---: |")
    for name, speed in found.items():
        print(f"| {name} | {speed:.2f} |")
    best = {
        kind: max(speed for name, speed in found.items() if name.startswith(kind))
        for kind in ("guidance-free", "guided")
    }
    print(f"\nBest against best {best['guidance-free'] / best['guided']:.2f}, goal {GOAL_FREE}.", end="")
    if decode_s:
        free, guided = (1 / best[kind] + decode_s for kind in ("guidance-free", "guided"))
        print(f" With {decode_s:.2f} s per image for decoding (VQ-16's shape, 256 px): {guided / free:.2f} end to end.")
    else:
        print()


def decoding_seconds() -> float:
    spec = family("llamagen").released.tokenizer_spec("VQ-16", ())
    tokenizer = VQTokenizer(spec).eval()
    tokens = torch.randint(spec.codebook_size, (2, 256), generator=torch.Generator().manual_seed(0))
    return medians({"decode": lambda: decode_images(tokenizer, tokens, batch_size=2)}, 2)["decode"] / 2


def main() -> int:
    parser = argparse.ArgumentParser(description="The generation engine against the official loop.")
    parser.add_argument("--shapes", nargs="+", choices=sorted(BATCHES), default=["digits", "B"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    print("# The generation engine\n")
    command = " ".join(["python benchmarks/sampling.py", *sys.argv[1:]])
    print(f"`{command}`, commit {commit.strip()}, {os.cpu_count()} CPU cores,")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {arguments.repeats} in turn.")
    print(f"Goals: all in {GOAL_ALL_IN} times official, same backend {GOAL_SAME_BACKEND} times at 16.")
    for shape in arguments.shapes:
        against_official(shape, arguments.repeats)
        free_against_guided(shape, arguments.repeats, decoding_seconds() if shape == "B" else 0.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
