"""The formats of compressed gradients: how many bytes, and where a piece of one may begin.

What each bit means is written in docs/kernels.md. A format cuts an array into blocks, each compressed by itself, one
behind the other. So a piece that begins at a multiple of a block is compressed as it would be within the whole, to the
bit. All lengths are whole 32-bit words.
"""

from __future__ import annotations

from dataclasses import dataclass

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Format:
    """One of them.

    Args:
        bits: of an element.
        block: elements that share a scale; pieces are multiples of it.
        granule: elements whose codes fill whole words; the last one is padded with zeros.
        header_words: of a block: its scale, a float32, or none.
    """

    name: str
    bits: int
    block: int
    granule: int
    header_words: int

    @property
    def block_words(self) -> int:
        """Of a whole block."""
        return self.header_words + self.block * self.bits // WORD_BITS

    def nbytes(self, elements: int) -> int:
        """What so many elements need."""
        codes = -(-elements // self.granule) * self.granule * self.bits // WORD_BITS
        return 4 * (-(-elements // self.block) * self.header_words + codes)


TWO_BIT = Format("2bit", bits=2, block=32, granule=32, header_words=0)
ONE_BIT = Format("1bit", bits=1, block=1024, granule=32, header_words=1)
INT8 = Format("int8", bits=8, block=256, granule=4, header_words=1)
FORMATS = {each.name: each for each in (TWO_BIT, ONE_BIT, INT8)}
