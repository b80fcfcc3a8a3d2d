"""Training a byte-level BPE tokenizer on part of a source.

The part is spread evenly over the source and the same on every run, and training is deterministic, so the
same source and size give the same tokenizer.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .blocks import Block
from .config import DataConfig
from .reader import BlockReader
from .tokenizer import END_NAMES

SMALLEST_VOCAB = 257  # every byte, and the end token
DEFAULT_VOCAB = 8192
_SAMPLED_BLOCKS = 32
_SAMPLED_BYTES = 1 << 20  # of each of these blocks; the library takes about ten times that in memory


def sample_texts(config: DataConfig, blocks: Sequence[Block]) -> list[str]:
    """The first documents of evenly spaced blocks; a document is cut where the block's share ends."""
    count = min(_SAMPLED_BLOCKS, len(blocks))
    chosen = [blocks[len(blocks) * number // count] for number in range(count)]
    reader = BlockReader(config)
    texts = []
    try:
        for block in chosen:
            room = _SAMPLED_BYTES * _SAMPLED_BLOCKS // count
            for row in reader.read(block).documents.rows():
                if room <= 0:
                    break
                texts.append(row[:room].tobytes().decode("utf-8", errors="ignore"))
                room -= len(row)
    finally:
        reader.close()
    return texts


def train_bpe(texts: Sequence[str], vocab_size: int) -> bytes:
    """The tokenizer.json of a byte-level BPE of at most `vocab_size` ids, any text to which is lossless."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return bytes(tokenizer.to_str().encode("utf-8"))
