"""Text to token ids: raw bytes, or any `tokenizer.json` of the `tokenizers` library.

Special tokens are never produced from text: a document that spells one out is plain text. One of them, the
end token, is put after every document by the pipeline itself.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as TokenizerModel

from .config import DataConfig
from .errors import DataError
from .ragged import Ragged, offsets_of
from .sources import source_entries, tokens_folder
from .token_shards import TOKENIZER_NAME

TokenType: TypeAlias = type[np.uint16] | type[np.uint32]

END_NAMES = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
    "<|end|>",
    "[SEP]",
)

_ENCODE_AT_ONCE = 4 << 20  # bytes of text given to the library in one call, which holds some 30 times that


class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer; `vocab_size` counts the end token."""

    vocab_size: int
    end_id: int
    fingerprint: str
    token_bytes: npt.NDArray[np.int64]  # [vocab_size]: bytes of text an id stands for, 0 for special tokens

    def encode(self, documents: Ragged) -> Ragged:
        """UTF-8 documents to token ids, each followed by the end token: values uint16 or uint32."""
        ...

    def encode_batch(self, texts: Sequence[bytes | str]) -> list[npt.NDArray[Any]]:
        """Token ids of every text, without an end token."""
        ...

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of token ids; special tokens are left out."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a document."""

    vocab_size = 257
    end_id = 256
    fingerprint = "bytes"

    def __init__(self) -> None:
        self.token_bytes = np.array([1] * 256 + [0], dtype=np.int64)

    def encode(self, documents: Ragged) -> Ragged:
        """See Tokenizer."""
        return documents.with_end(self.end_id, np.uint16)

    def encode_batch(self, texts: Sequence[bytes | str]) -> list[npt.NDArray[Any]]:
        """See Tokenizer."""
        return [np.frombuffer(_as_bytes(text), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """See Tokenizer; bytes that are no UTF-8 become replacement characters."""
        array = np.asarray(ids)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class JsonTokenizer:
    """A `tokenizer.json`. Raises DataError when it cannot be read or names no end token."""

    def __init__(self, path: Path) -> None:
        raw = _read(path)
        try:
            self._model = TokenizerModel.from_str(raw.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for every fault of the file
            raise DataError(
                f"data.tokenizer: {path} is no tokenizer of the tokenizers library ({error}), so text cannot "
                'be encoded. Give a tokenizer.json, or set data.tokenizer = "bytes".'
            ) from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_id = _end_id(vocabulary, path)
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        self.token_bytes = _token_bytes(json.loads(raw), vocabulary, self.vocab_size)
        self.dtype: TokenType = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, documents: Ragged) -> Ragged:
        """See Tokenizer."""
        parts: list[npt.NDArray[Any]] = []
        waiting: list[bytes | str] = []
        size = 0
        for row in documents.rows():
            waiting.append(row.tobytes())
            size += len(row)
            if size >= _ENCODE_AT_ONCE:
                parts += self.encode_batch(waiting)
                waiting, size = [], 0
        parts += self.encode_batch(waiting)
        lengths = np.fromiter((len(part) for part in parts), dtype=np.int64, count=len(parts))
        values = np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)
        return Ragged(values=values, offsets=offsets_of(lengths)).with_end(self.end_id, self.dtype)

    def encode_batch(self, texts: Sequence[bytes | str]) -> list[npt.NDArray[Any]]:
        """See Tokenizer."""
        strings = [text if isinstance(text, str) else text.decode("utf-8") for text in texts]
        encoded = self._model.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(found.ids, dtype=self.dtype) for found in encoded]

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """See Tokenizer."""
        return str(self._model.decode([int(i) for i in ids], skip_special_tokens=True))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called "bytes", or the one in the file `name` (or in `name`/tokenizer.json)."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    return JsonTokenizer(path / TOKENIZER_NAME if path.is_dir() else path)


def resolve_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of the run: the one a tokenized source was written with, or else `data.tokenizer`.

    Raises DataError when two of them differ, since ids of one mean nothing to another.
    """
    chosen = None if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer)
    origin = f"data.tokenizer = {config.tokenizer!r}"
    for entry in source_entries(config):
        if config.format not in ("auto", "tokens") or not tokens_folder(entry.root):
            continue
        path = entry.root / TOKENIZER_NAME
        found = JsonTokenizer(path)
        if chosen is not None and chosen.fingerprint != found.fingerprint:
            raise DataError(
                f"{entry.path!r} was tokenized with {path} (sha256 {found.fingerprint[:12]}), but {origin} "
                f"is another one (sha256 {chosen.fingerprint[:12]}), so its ids would mean other text. Set "
                f"data.tokenizer = {str(path)!r}, or tokenize the source again."
            )
        chosen, origin = found, str(path)
    return chosen or ByteTokenizer()


def tokenizer_file(config: DataConfig) -> Path | None:
    """The tokenizer.json of the run; None for bytes, which need none."""
    for entry in source_entries(config):
        if config.format in ("auto", "tokens") and tokens_folder(entry.root):
            return entry.root / TOKENIZER_NAME
    if config.tokenizer == "bytes":
        return None
    path = Path(config.tokenizer).expanduser()
    return path / TOKENIZER_NAME if path.is_dir() else path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"data.tokenizer: {path} cannot be read ({error.strerror}), so text cannot be encoded. Give the "
            'path of a tokenizer.json, or set data.tokenizer = "bytes".'
        ) from error


def _end_id(vocabulary: dict[str, int], path: Path) -> int:
    for name in END_NAMES:
        if name in vocabulary:
            return vocabulary[name]
    raise DataError(
        f"data.tokenizer: {path} has none of the end tokens {', '.join(END_NAMES)}, so documents could not "
        f'be told apart. Add "{END_NAMES[0]}" to its added_tokens, or set data.tokenizer = "bytes".'
    )


def _token_bytes(description: dict[str, Any], vocabulary: dict[str, int], size: int) -> npt.NDArray[np.int64]:
    """Bytes of text every id stands for: [size], 0 for special tokens and unused ids."""
    text = json.dumps([description.get("decoder"), description.get("pre_tokenizer")])
    # A byte-level vocabulary writes every byte as one character of its own alphabet.
    byte_level = '"ByteLevel"' in text
    lengths = np.zeros(size, dtype=np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token) if byte_level else _plain_length(token)
    for added in description.get("added_tokens", []):
        lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode("utf-8"))
    return lengths


def _plain_length(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1  # a byte the vocabulary has no character for
    return len(token.removeprefix("##").replace("\u2581", " ").encode("utf-8"))


def _as_bytes(text: bytes | str) -> bytes:
    return text.encode("utf-8") if isinstance(text, str) else text
