"""Train the bundled checkpoint: ``python -m examples.multi30k.train --data DIR --work DIR``.

Resumable: every epoch ends with its weights and the optimizer's state on disk. Batches and dropout depend on the seed and the
epoch's number alone; SentencePiece's sampling of segmentations does not repeat from process to process, whatever its seed.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import time
from pathlib import Path

import click
import numpy as np
import sacrebleu
import sentencepiece
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from examples.multi30k import data as corpus
from examples.multi30k.fast_cpu import OutputLoss, replace_dropout
from examples.multi30k.recipe import Recipe
from export.model import Transformer, length_mask


def loss_of(model: Transformer, batch: corpus.Batch, smoothing: float) -> tuple[Tensor, Tensor, int]:
    """(smoothed loss, plain loss, tokens) of a batch; the losses are means over its real tokens."""
    # The fused attention kernel's backward pass took two fifths of a step at these lengths.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        source_mask = length_mask(batch.source_lengths, batch.source_ids.shape[1])
        memory = model.encoder(batch.source_ids, source_mask)
        states = model.decoder(batch.target_ids, memory, source_mask)
    real = batch.next_ids != corpus.PAD_ID
    smoothed, plain = OutputLoss.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        states[real].float(), model.output.weight, batch.next_ids[real], smoothing
    )
    return smoothed, plain, int(real.sum())


@torch.no_grad()
def translate(model: Transformer, sources: list[list[int]], batch_size: int = 128) -> list[list[int]]:
    """Greedy translations for the learning curve: a plain loop over the full pass, longest sources first."""
    results: list[list[int]] = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = corpus.make_batch([(sources[i], []) for i in rows])
        source_mask = length_mask(batch.source_lengths, batch.source_ids.shape[1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            memory = model.encoder(batch.source_ids, source_mask)
            target = batch.target_ids
            finished = torch.zeros(len(rows), dtype=torch.bool)
            for _ in range(2 * batch.source_ids.shape[1] + 10):
                states = model.decoder(target, memory, source_mask)[:, -1]
                best = model.output(states).argmax(-1).masked_fill(finished, corpus.EOS_ID)
                target = torch.cat([target, best[:, None]], dim=1)
                finished |= best == corpus.EOS_ID
                if finished.all():
                    break
        for i, ids in zip(rows, target[:, 1:].tolist(), strict=True):
            results[i] = ids[: ids.index(corpus.EOS_ID)] if corpus.EOS_ID in ids else ids
    return results


@dataclasses.dataclass(slots=True)
class Run:
    """What a resumed run needs: the model, its optimizer, how far it is."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0

    def save(self, path: Path) -> None:
        """Write the state whole or not at all."""
        state = {"optimizer": self.optimizer.state_dict(), "epoch": self.epoch, "step": self.step}
        torch.save(self.model.state_dict(), path.parent / f"epoch{self.epoch:03d}.pt")
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Continue from a saved state."""
        state = torch.load(path, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.model.load_state_dict(torch.load(path.parent / f"epoch{self.epoch:03d}.pt", weights_only=True))


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Multi30k, raw text.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the run's state lives.")
@click.option("--epochs", type=int, default=Recipe().epochs, show_default=True)
def main(data: Path, work: Path, epochs: int) -> None:
    """Train on Multi30k English to German; call again to resume."""
    recipe = Recipe(epochs=epochs)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_path = work / "sentencepiece.model"
    if not tokenizer_path.exists():
        lines = corpus.read_lines(data, "train", "en") + corpus.read_lines(data, "train", "de")
        corpus.train_tokenizer(lines, tokenizer_path, recipe)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    train_text = corpus.ParallelText(data, "train", tokenizer)
    validation_text = corpus.ParallelText(data, "val", tokenizer)
    validation_pairs = validation_text.encoded()

    torch.manual_seed(recipe.seed)
    config = recipe.model(pad_id=corpus.PAD_ID, bos_id=corpus.BOS_ID, eos_id=corpus.EOS_ID)
    model = Transformer(config)
    dropout_rng = np.random.Generator(np.random.SFC64(recipe.seed))
    replace_dropout(model, dropout_rng)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
    run = Run(model, optimizer)
    state_path = work / "state.pt"
    if state_path.exists():
        run.load(state_path)
    (work / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")
    (work / "model.json").write_text(config.model_dump_json(indent=2) + "\n")

    while run.epoch < recipe.epochs:
        started = time.monotonic()
        run.epoch += 1
        rng = np.random.default_rng([recipe.seed, run.epoch])
        dropout_rng.bit_generator.state = np.random.SFC64([recipe.seed, run.epoch]).state
        sentencepiece.set_random_generator_seed(recipe.seed + run.epoch)
        pairs = train_text.encoded(sampling_alpha=recipe.sampling_alpha)
        batches = list(corpus.epoch_batches(pairs, recipe.batch_tokens, rng))
        model.train()
        total, tokens = 0.0, 0
        for batch in (bar := tqdm(batches, desc=f"epoch {run.epoch}/{recipe.epochs}", unit="step", mininterval=1)):
            run.step += 1
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(run.step, config.d_model)
            smoothed, plain, n = loss_of(model, batch, recipe.label_smoothing)
            smoothed.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            total, tokens = total + plain.item() * n, tokens + n
            bar.set_postfix(loss=f"{total / tokens:.3f}", refresh=False)
        model.eval()
        with torch.no_grad():
            parts = [loss_of(model, b, recipe.label_smoothing)[1:] for b in corpus.epoch_batches(validation_pairs, 3000, rng)]
        validation = sum(plain.item() * n for plain, n in parts) / sum(n for _, n in parts)
        bleu: float | None = None
        if run.epoch % recipe.bleu_every_epochs == 0 or run.epoch == recipe.epochs:
            output = tokenizer.decode(translate(model, [source for source, _ in validation_pairs]))
            bleu = sacrebleu.corpus_bleu(output, [validation_text.targets]).score
        run.save(state_path)
        log_path = work / "log.csv"
        new = not log_path.exists()
        with log_path.open("a", newline="") as stream:
            writer = csv.writer(stream)
            if new:
                writer.writerow(["epoch", "step", "train_loss", "validation_loss", "validation_bleu", "seconds"])
            seconds = f"{time.monotonic() - started:.1f}"
            row = [run.epoch, run.step, f"{total / tokens:.4f}", f"{validation:.4f}", f"{bleu:.2f}" if bleu is not None else ""]
            writer.writerow([*row, seconds])


if __name__ == "__main__":
    main()
