"""The recipe's figures in one place: model, tokenizer, optimization."""

from __future__ import annotations

import math
from dataclasses import dataclass

from export.model import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the outcome of a run; the defaults made the shipped checkpoint."""

    seed: int = 20161
    # One SentencePiece unigram vocabulary for both languages.
    vocab_size: int = 6000
    # Subword regularization (Kudo, 2018): each epoch segments anew; 0 takes the best segmentation only.
    sampling_alpha: float = 0.5
    epochs: int = 20
    # Padded target tokens of one optimizer step.
    batch_tokens: int = 2000
    # Paper, 5.3: lr = factor * d_model^-0.5 * min(step^-0.5, step * warmup^-1.5), Adam 0.9 / 0.98 / 1e-9.
    warmup_steps: int = 600
    learning_rate_factor: float = 0.3
    label_smoothing: float = 0.1
    dropout: float = 0.15
    max_gradient_norm: float = 1.0
    # The shipped weights are the mean of the last so many epochs' (6.1).
    averaged_epochs: int = 4
    # BLEU on the validation set every so many epochs, for the learning curve.
    bleu_every_epochs: int = 5

    def model(self, *, pad_id: int, bos_id: int, eos_id: int) -> ModelConfig:
        """The architecture: the paper's, small enough for 29,000 captions; half the depth of the paper on the target side."""
        return ModelConfig(
            source_vocab_size=self.vocab_size,
            target_vocab_size=self.vocab_size,
            d_model=256,
            num_heads=4,
            num_encoder_layers=4,
            num_decoder_layers=3,
            encoder_d_ff=512,
            decoder_d_ff=512,
            dropout=self.dropout,
            max_positions=512,
            pad_id=pad_id,
            eos_id=eos_id,
            decoder_start_id=bos_id,
        )

    def learning_rate(self, step: int, d_model: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 1 (paper, equation 3)."""
        warm_up, decay = step / self.warmup_steps / math.sqrt(self.warmup_steps), 1 / math.sqrt(step)
        return self.learning_rate_factor / math.sqrt(d_model) * min(warm_up, decay)
