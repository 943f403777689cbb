"""fairseq's translation models: a checkpoint as ``fairseq-train`` writes it, and its dictionaries.

A directory with the checkpoint (``checkpoint_best.pt`` or another ``.pt``) and ``dict.<language>.txt`` of both sides, or the
``.pt`` with these beside it; a SentencePiece model or byte-pair codes, where they lie there too, cut the text. Knows these files
and the names of tensors, old ones too; does not know settings (``fairseq_config.py``) or what a checkpoint becomes.

**Settings** are the command line's, under ``args``, or those of ``cfg``; an ``argparse.Namespace``, OmegaConf's containers or
plain values, none of which is loaded as what it is (``stand_ins.py``). Those that make the architecture are read with fairseq's
defaults; what would make one that this project's module has no place for is refused, all at once.

**What fairseq does its own way** (fairseq/modules, fairseq/data/dictionary.py): a dictionary's file starts at token 4, after
``<s>``, ``<pad>``, ``</s>`` and ``<unk>``; a target starts with ``</s>``; positions count from 2, and computed ones are sines,
then cosines, with rates 10000^(-i / (d/2 - 1)).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from export.checkpoint.archives import file_sha256, read_pickle, weights_of
from export.checkpoint.base import Checkpoint, read_samples
from export.checkpoint.fairseq_config import CLASSES, PAD_ID, FairseqConfig, moses_of, read_arguments, read_settings
from export.checkpoint.hugging_face import rename
from export.checkpoint.vocabulary import Vocabularies, choose_tokenizer
from export.model import ModelConfig
from serving.errors import CheckpointError
from serving.manifest import LanguagePair

# The most telling names of a checkpoint; where there is none of them, the only ``.pt`` there is.
MODEL_NAMES = ("checkpoint_best.pt", "model.pt", "checkpoint_last.pt")
_DICTIONARY = re.compile(r"dict\.([^.]+)\.txt")
_CONVERSION = (
    "where fairseq is installed, and if you trust the file, write it anew without: "
    'state = torch.load(FILE, weights_only=False); torch.save({"args": state.get("args"), "cfg": state.get("cfg") and '
    'omegaconf.OmegaConf.to_container(state["cfg"], resolve=True, enum_to_str=True), "model": state["model"]}, NEW_FILE)'
)

_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
# Behind a token that may be there twice.
_MAY_REPEAT = " #fairseq:overwrite"
# Tensors that are no weights of the architecture.
_NO_WEIGHTS = ("version", "embed_positions._float_tensor", "embed_positions.weights")
# What 0.12.2 keeps of every encoder layer for a faster pass beside its weights, in one piece each: made anew of these when it is
# loaded, and zeros until then.
_COPIES = re.compile(r"encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)")
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
_ATTENTIONS = {
    "encoder": {"self_attn": "self_attention"},
    "decoder": {"self_attn": "self_attention", "encoder_attn": "cross_attention"},
}
# What the norms of a layer were called when they were a list.
_OLD_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}


class FairseqReader:
    """Reads this format; see ``CheckpointReader``."""

    description = f"fairseq ({MODEL_NAMES[0]} with dict.<language>.txt of both sides; or the .pt)"

    def recognizes(self, path: Path) -> bool:
        """Whether dictionaries lie beside a ``.pt``: no other format has both."""
        if path.is_dir():
            return bool(_dictionaries_in(path)) and bool(_models_in(path))
        return path.suffix == ".pt" and path.is_file() and bool(_dictionaries_in(path.parent))

    def read(self, path: Path) -> Checkpoint:
        """Read and check the whole checkpoint.

        Raises:
            CheckpointError: with every fault. Tensors are looked at only when settings and dictionaries are known.
        """
        faults: list[str] = []
        directory = path if path.is_dir() else path.parent
        models = _models_in(path) if path.is_dir() else [path]
        if len(models) != 1:
            names = ", ".join(model.name for model in models)
            raise CheckpointError(
                path, [f"one checkpoint is needed, and there are several: {names}; give one of them instead of the directory"]
            )
        model_path = models[0]
        document = read_pickle(model_path, CLASSES, _CONVERSION, faults)
        arguments = read_arguments(document, model_path.name, faults) if document else None
        settings = read_settings(arguments, model_path.name, faults) if arguments is not None else None
        state = weights_of(document, "model", model_path.name, faults) if document else {}
        dictionaries = _read_dictionaries(directory, settings, state, faults) if settings else None
        sample_lines = read_samples(directory, faults)
        if arguments is None or settings is None or dictionaries is None or not state:
            raise CheckpointError(path, faults)
        source, target, languages = dictionaries
        if settings.share_all_embeddings and source.ids != target.ids:
            raise CheckpointError(
                path, [*faults, f"{model_path.name}: share_all_embeddings: the dictionaries of source and target differ"]
            )
        config = settings.architecture(source.size, target.size)
        tensors = _tensors(config, settings, state, model_path.name, faults)
        vocabularies = Vocabularies(source=source.ids, target=target.ids, special_tokens=_SPECIAL_TOKENS)
        choice = choose_tokenizer(directory, vocabularies, faults, moses=moses_of(arguments, settings))
        if faults or choice is None:
            raise CheckpointError(path, faults)
        return Checkpoint(
            name=directory.resolve().name if path.is_dir() else model_path.stem,
            config=config,
            tensors=tensors,
            languages=languages,
            tokenizer=choice.spec,
            tokenizer_files=choice.files,
            weights_sha256=file_sha256(model_path),
            sample_lines=sample_lines,
            warnings=choice.warnings,
        )


@dataclass(frozen=True, slots=True)
class _Dictionary:
    # Token -> id.
    ids: dict[str, int]
    # Rows of the embedding.
    size: int


def position_table(num_positions: int, d_model: int) -> Tensor:
    """Positions of fairseq, from the first token's on: sines, then cosines, of p * 10000^(-i / (d/2 - 1)), p from 2.

    Returns:
        [num_positions, d_model] float32.
    """
    num_rates = d_model // 2
    rate = torch.exp(torch.arange(num_rates, dtype=torch.float32) * -(math.log(10000.0) / (num_rates - 1)))
    first = PAD_ID + 1
    angle = torch.arange(first, first + num_positions, dtype=torch.float32)[:, None] * rate  # [num_positions, d_model / 2]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Name in fairseq -> ours, of every tensor; a shared matrix has several."""
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in _parameter_names(config) for kind in ("weight", "bias")}
    for side in ("decoder", "encoder"):
        names[f"{side}.embed_tokens.weight"] = f"{side}.embedding.tokens.weight"
        names[f"{side}.embed_positions.weight"] = f"{side}.embedding.position_table"
    names["decoder.output_projection.weight"] = "output.weight"
    # As it was called before.
    names["decoder.embed_out"] = "output.weight"
    return names


def _parameter_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(fairseq's name, ours) of every projection and norm, without ``.weight`` and ``.bias``."""
    for side, depth in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        for i in range(depth):
            layer = f"{side}.layers.{i}"
            for attn, attention in _ATTENTIONS[side].items():
                for proj, projection in _PROJECTIONS.items():
                    yield f"{layer}.{attn}.{proj}", f"{layer}.{attention}.{projection}"
                yield f"{layer}.{attn}_layer_norm", f"{layer}.{attention}_residual.norm"
            yield f"{layer}.fc1", f"{layer}.feed_forward.inner"
            yield f"{layer}.fc2", f"{layer}.feed_forward.outer"
            yield f"{layer}.final_layer_norm", f"{layer}.feed_forward_residual.norm"
        if config.norm == "pre":
            yield f"{side}.layer_norm", f"{side}.final_norm"
        if config.embedding_norm:
            yield f"{side}.layernorm_embedding", f"{side}.embedding.norm"


def _models_in(directory: Path) -> list[Path]:
    for name in MODEL_NAMES:
        if (directory / name).is_file():
            return [directory / name]
    return sorted(directory.glob("*.pt"))


def _dictionaries_in(directory: Path) -> dict[str, Path]:
    """Language -> its dictionary."""
    found = ((_DICTIONARY.fullmatch(path.name), path) for path in sorted(directory.glob("dict.*.txt")))
    return {match[1]: path for match, path in found if match}


def _read_dictionaries(
    directory: Path, settings: FairseqConfig, state: Mapping[str, Tensor], faults: list[str]
) -> tuple[_Dictionary, _Dictionary, list[LanguagePair]] | None:
    """Of source and target, and what these are where that is known; None after a fault."""
    paths = _dictionaries_in(directory)
    stated = _stated_pair(settings, paths)
    # Not to be told apart otherwise, as a rule both of one model.
    languages = sorted(paths) if stated is None else [stated.source, stated.target]
    read: dict[str, _Dictionary] = {}
    for language in dict.fromkeys(languages):
        # A language may be called anything; only what lies in the directory is read.
        if language not in paths:
            faults.append(f"dict.{language}.txt: is missing")
            continue
        try:
            read[language] = _read_dictionary(paths[language])
        except (OSError, ValueError) as error:
            faults.append(f"{paths[language].name}: {error}")
    if not set(languages) <= read.keys():
        return None
    if stated is not None:
        return read[stated.source], read[stated.target], [stated]
    return _told_apart(read, state, faults)


def _stated_pair(settings: FairseqConfig, paths: Mapping[str, Path]) -> LanguagePair | None:
    """What the settings say: of one side alone, where one of two dictionaries is its, the other is the other side's."""
    source, target = settings.source_lang, settings.target_lang
    one = target if source is None else source
    if one in paths and len(paths) == 2:
        (other,) = paths.keys() - {one}
        source, target = other if source is None else source, other if target is None else target
    return None if source is None or target is None else LanguagePair(source=source, target=target)


def _told_apart(
    read: Mapping[str, _Dictionary], state: Mapping[str, Tensor], faults: list[str]
) -> tuple[_Dictionary, _Dictionary, list[LanguagePair]] | None:
    """Which dictionary is whose, where the settings do not say: ``fairseq-train`` looks for it in its data and may not store it.

    Two that are the same are no matter, but for the languages; others are known by the number of their tokens.
    """
    sizes = [state[name].shape[:1] for side in ("encoder", "decoder") if (name := f"{side}.embed_tokens.weight") in state]
    pairs = [
        (source, target)
        for source in read
        for target in read
        if source != target and sizes == [(read[source].size,), (read[target].size,)]
    ]
    if len(read) == 2 and len({tuple(dictionary.ids.items()) for dictionary in read.values()}) == 1:
        source, target = read.values()
        return source, target, []
    if len(pairs) == 1:
        (pair,) = pairs
        return read[pair[0]], read[pair[1]], [LanguagePair(source=pair[0], target=pair[1])]
    faults.append("source_lang, target_lang: are not stated, so that source and target cannot be told apart")
    return None


def _read_dictionary(path: Path) -> _Dictionary:
    """A line is a token, its count and maybe a flag. Raises ValueError for what is no dictionary."""
    ids = {token: i for i, token in enumerate(_SPECIAL_TOKENS)}
    size = len(ids)
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            token, _, count = line.rstrip().removesuffix(_MAY_REPEAT).rpartition(" ")
            if not token or not re.fullmatch(r"-?[0-9]+", count):
                raise ValueError(f"line {size - len(_SPECIAL_TOKENS) + 1} is no token with its count")
            if token in ids and not line.rstrip().endswith(_MAY_REPEAT):
                raise ValueError(f"{token!r} is there twice")
            # The later one is meant where one is there twice; both have rows of the embedding.
            ids[token] = size
            size += 1
    return _Dictionary(ids, size)


def _tensors(
    config: ModelConfig, settings: FairseqConfig, state: Mapping[str, Tensor], file_name: str, faults: list[str]
) -> dict[str, Tensor]:
    """Tensors by our names; what is wrong with them goes to ``faults``."""
    stored = {name: tensor for name, tensor in _renewed(state) if name.partition(".")[2] not in _NO_WEIGHTS}
    for side, is_learned in (("encoder", settings.encoder_learned_pos), ("decoder", settings.decoder_learned_pos)):
        name = f"{side}.embed_positions.weight"
        if not is_learned:
            stored[name] = position_table(config.max_positions, config.d_model)
        elif name in stored:
            # The rows of padding and of what is before it are for no token.
            stored[name] = stored[name][PAD_ID + 1 :][: config.max_positions]
    return rename(config, stored, tensor_names(config), file_name, faults)


def _renewed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names that they have today."""
    for name, tensor in state.items():
        if _COPIES.fullmatch(name):
            continue
        if tensor.dim() > 0 and (match := re.fullmatch(r"(.*\.)in_proj_(weight|bias)", name)):
            # Queries, keys and values were one product.
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=False):
                yield f"{match[1]}{projection}.{match[2]}", part
        elif match := re.fullmatch(r"((encoder|decoder)\.layers\.\d+)\.layer_norms\.([0-2])\.(weight|bias)", name):
            norms = _OLD_NORMS[match[2]]
            yield (f"{match[1]}.{norms[int(match[3])]}.{match[4]}" if int(match[3]) < len(norms) else name), tensor
        else:
            yield name, tensor
