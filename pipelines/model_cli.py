"""Reads arguments and models, writes models, samples or a description: the ``cca`` commands on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cca_core.config import ConfigError

app = typer.Typer()
console = Console()


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Official .pt/.pth file of a model or tokenizer, or a bundle.")],
    out: Annotated[Path, typer.Argument(help="Directory to write: a bundle, or the official files of a bundle.")],
    num_tokens: Annotated[
        int, typer.Option(help="LlamaGen model: tokens per image, which its file does not tell: 256, 576, ...")
    ] = 0,
    num_heads: Annotated[int, typer.Option(help="Heads, only for sizes that are not official.")] = 0,
    num_cond_tokens: Annotated[int, typer.Option(help="Text-conditional LlamaGen: caption tokens, if not 120.")] = 0,
    patch_nums: Annotated[str, typer.Option(help="VAR tokenizer: sides of its grids, as in 1,2,3,4.")] = "",
    weights: Annotated[str, typer.Option(help="model, or ema where the file has both.")] = "model",
) -> None:
    """Convert an official checkpoint to a bundle (safetensors and JSON, no pickle), or a bundle back.

    The direction follows from SOURCE; every tensor keeps its bits both ways.
    """
    from cca_core.convert import convert as convert_checkpoint

    numbers = (("num_tokens", num_tokens), ("num_heads", num_heads), ("num_cond_tokens", num_cond_tokens))
    spec: dict[str, Any] = {name: value for name, value in numbers if value}
    if patch_nums:
        if not all(side.strip().isdigit() for side in patch_nums.split(",")):
            raise ConfigError(f"--patch-nums {patch_nums} are not whole numbers: write them as 1,2,3,4")
        spec["patch_nums"] = tuple(int(side) for side in patch_nums.split(","))
    written = convert_checkpoint(source, out, weights=weights, **spec)
    _say(f"{out}: {written}. Look at it with: cca inspect {out}")


@app.command("export-samples")
def export_samples(
    bundle: Annotated[str, typer.Argument(help="A bundle: base/ or align/ of a run, or what cca convert wrote.")],
    out: Annotated[Path, typer.Argument(help="The .npz to write.")],
    num_samples: Annotated[int, typer.Option(help="Images to draw, classes in turn.")] = 50_000,
    seed: Annotated[int, typer.Option(help="Sampling seed; that of evaluate.seeds gives the images measured.")] = 0,
    cfg_scale: Annotated[float, typer.Option(help="Guidance; 1 is none.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Temperature.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set that reaches p; 1 keeps all.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once, all that is in memory.")] = 50,
) -> None:
    """Write samples of a bundle as the .npz that the ADM evaluator reads: arr_0 uint8 [N, H, W, 3], arr_1 class ids."""
    from cca_core.export import export_samples as export
    from cca_core.generate import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, cfg_scale=cfg_scale)
    with console.status("") as line:
        shape = export(
            bundle,
            out,
            num_samples=num_samples,
            sampling=sampling,
            seed=seed,
            batch_size=batch_size,
            on_progress=lambda done: line.update(f"{done} of {num_samples} samples"),
        )
    _say(f"{out}: {shape[0]} images of {shape[1]} x {shape[2]} pixels (arr_0) and their class ids (arr_1)")
    _say(f"Measure them with the ADM evaluator: python evaluator.py REFERENCE.npz {out}")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A bundle, a stage directory or an official checkpoint; any fsspec URI.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every file of a stage directory against its hash.")
    ] = False,
) -> None:
    """Say what a path is: bundle, stage directory or official checkpoint."""
    from cca_core.inspect import describe

    for key, value in describe(path, verify=verify).items():
        console.print(f"{key:<14} {value}", highlight=False, soft_wrap=True, markup=False)


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
