"""The peer: CTranslate2 int8 behind mosec's dynamic batching; a program of its own, run with the Python that has both.

Text in, text out, as JSON with one key, "text". Each worker is a process with one CTranslate2 thread, which takes whole batches;
so one a core is its best split. The targets of a batch have one limit, that of its longest source. Imports nothing of this
project.
"""

from __future__ import annotations

import argparse

import ctranslate2
import sentencepiece
from mosec import Server, ValidationError, Worker

_END_OF_SENTENCE = "</s>"


def options() -> argparse.Namespace:
    """Of the command line; mosec reads its own (address, port, timeout) from the same, and so does each worker's process."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Directory that a CTranslate2 converter wrote.")
    parser.add_argument("--source-tokenizer", required=True, help="SentencePiece model.")
    parser.add_argument("--target-tokenizer", required=True, help="SentencePiece model.")
    parser.add_argument("--compute-type", default="int8")
    parser.add_argument("--beam-size", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="Processes of one thread.")
    parser.add_argument("--batch-size", type=int, default=32, help="Texts of one batch, at most.")
    parser.add_argument("--wait-ms", type=int, default=5, help="Milliseconds to wait for a full batch.")
    known, _ = parser.parse_known_args()
    return known


def longest_target(source: list[str]) -> int:
    """Tokens at which a target is cut: onnxlate's server's own rule, by the source's tokens with the end of the sentence."""
    return 2 * len(source) + 32


class Translator(Worker):  # type: ignore[misc]  # Any where mosec is not installed
    """One process: texts of a batch are tokenized, translated together, and detokenized."""

    def __init__(self) -> None:
        super().__init__()
        chosen = options()
        self._beam_size = chosen.beam_size
        self._source = sentencepiece.SentencePieceProcessor(model_file=chosen.source_tokenizer)
        self._target = sentencepiece.SentencePieceProcessor(model_file=chosen.target_tokenizer)
        self._translator = ctranslate2.Translator(
            chosen.model, device="cpu", compute_type=chosen.compute_type, inter_threads=1, intra_threads=1
        )

    def deserialize(self, data: bytes) -> str:
        """The text of one request.

        Raises:
            ValidationError: there is none; mosec answers 422.
        """
        request = super().deserialize(data)
        if not isinstance(request, dict) or not isinstance(request.get("text"), str):
            raise ValidationError('the body must be {"text": "..."}')
        return str(request["text"])

    def forward(self, data: list[str] | str) -> list[dict[str, str]] | dict[str, str]:
        """Translate a batch; with batches of one, mosec hands over the text itself."""
        if isinstance(data, str):
            return self._translate([data])[0]
        return self._translate(data)

    def _translate(self, texts: list[str]) -> list[dict[str, str]]:
        sources = [[*pieces, _END_OF_SENTENCE] for pieces in self._source.encode(texts, out_type=str)]
        results = self._translator.translate_batch(
            sources, beam_size=self._beam_size, max_decoding_length=max(map(longest_target, sources))
        )
        return [{"text": self._target.decode(result.hypotheses[0])} for result in results]


def main() -> None:
    """Serve until SIGTERM."""
    chosen = options()
    server = Server()
    server.append_worker(
        Translator, num=chosen.workers, max_batch_size=chosen.batch_size, max_wait_time=chosen.wait_ms, route="/translate"
    )
    server.run()


if __name__ == "__main__":
    main()
