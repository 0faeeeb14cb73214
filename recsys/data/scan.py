"""Read numbers from the bytes of a text: machine code that checks every field and writes columns.

A field's digits are read eight at a time, as the bytes of one 64-bit word on which all of them are computed at once.
Every number is such a word, since numba makes floats of signed and unsigned ones together.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from recsys.compiled import compiled, inlined

LABEL, DECIMAL, HEXADECIMAL, HOUR, UNUSED = range(5)
"""How fields are written: 0 or 1; decimal digits; 1 to 8 hexadecimal ones; 8 decimal ones; anything made of digits."""

RULE = np.dtype(
    [("notation", "u1"), ("limit", "u8"), ("is_signed", "?"), ("is_required", "?"), ("is_wide", "?"), ("place", "u8")],
    align=True,
)
"""How the fields of a column are read, and the column's place among those of its width."""

REACH = 9
"""Bytes behind the last newline that must be there to be read, whatever they are."""

U = np.uint64
_ONES, _HIGH_BITS, _LOW_BITS = U(0x0101010101010101), U(0x8080808080808080), U(0x7F7F7F7F7F7F7F7F)
_NIBBLES, _PAIRS, _QUADS = U(0x0F0F0F0F0F0F0F0F), U(0x00FF00FF00FF00FF), U(0x0000FFFF0000FFFF)
_NEWLINE, _MINUS, _ZERO, _NINE = U(ord("\n")), U(ord("-")), U(ord("0")), U(ord("9"))


@compiled
def read_rows(at: U, last: U, separator: U, rules: np.ndarray, row: U, columns: tuple[np.ndarray, ...]) -> U:
    """Read the lines from address `at` to `last` as rows from `row` on.

    Args:
        at: address of the first byte.
        last: address behind the last newline.
        separator: between fields; neither a digit nor a minus sign.
        rules: `RULE` of each column.
        row: of the first line.
        columns: wide ones uint64 [columns, rows], negative numbers as their two's complement; narrow ones uint32; and
            whether fields are not empty, bool [all columns, rows].

    Returns:
        The row behind the last line before the first malformed one.

    Every field is known to be well-formed before the next one is read. So a field begins at its line's newline or
    before, and what is read reaches less than `REACH` bytes behind that.
    """
    wide, narrow, is_present = columns
    while at < last:
        for index in range(len(rules)):
            rule = rules[index]
            end = separator if index < len(rules) - 1 else _NEWLINE
            begin = at
            value, at = _field(at, end, rule)
            if _byte(at) != end or (at == begin and rule.is_required):
                return row
            is_present[index, row] = at != begin
            if rule.is_wide:
                wide[rule.place, row] = value
            else:
                narrow[rule.place, row] = value
            at += U(1)
        row += U(1)
    return row


@inlined
def _field(at: U, end: U, rule: Any) -> tuple[U, U]:
    """Read a field; returns its value and where it ends, which is not at `end` if it is malformed."""
    value = U(0)
    if rule.notation == HEXADECIMAL:
        # Where the next field begins is told by a branch, which can be guessed: work on it need not wait.
        word = _word(at)
        if _byte(at + U(8)) == end and _are_hexadecimal(word):
            value = _hexadecimal(word)
            at += U(8)
        else:
            value, at = _short_hexadecimal(at)
    elif rule.notation == DECIMAL:
        value, at = _any_decimal(at, end, rule)
    elif rule.notation == HOUR:
        digits, length = _digits(_word(at), end)
        if length == U(8) and _are_decimal(digits):
            value = _decimal(digits)
            at += U(8)
    elif rule.notation == LABEL:
        value = _byte(at) - _ZERO
        at += U(value < U(2))
    else:
        at = _behind_unused(at)
    return value, at


@inlined
def _any_decimal(at: U, end: U, rule: Any) -> tuple[U, U]:
    word = _word(at)
    is_negative = U((word & U(0xFF)) == _MINUS)
    digits, length = _digits(word ^ is_negative * (_MINUS ^ _ZERO), end)
    value = U(0)
    if is_negative > U(rule.is_signed):
        pass
    elif length == U(8):
        value, at = _long_decimal(at + is_negative, rule.limit + is_negative)
    elif _are_decimal(digits) and length != is_negative:
        value = _decimal(digits)
        at += length
    return (value ^ (U(0) - is_negative)) + is_negative, at


def _load(kind: Any) -> Callable[..., Any]:
    """Generate code that reads a number from an address, wherever it lies."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        loaded = builder.load(builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer()))
        loaded.align = 1
        return builder.zext(loaded, context.get_value_type(types.uint64))

    return generate


@intrinsic
def _byte(_: Any, at: Any) -> Any:
    """Return the byte at an address."""
    return types.uint64(types.uint64), _load(types.uint8)


@intrinsic
def _word(_: Any, at: Any) -> Any:
    """Return the 8 bytes from an address on, the first one lowest."""
    return types.uint64(types.uint64), _load(types.uint64)


@inlined
def _in_range(word: U, first: U, last: U) -> U:
    """Set the highest bit of each byte that lies between two ASCII characters."""
    low = word & _LOW_BITS
    return (low + (U(0x80) - first) * _ONES) & ~(low + (U(0x7F) - last) * _ONES) & ~word & _HIGH_BITS


@inlined
def _are_hexadecimal(word: U) -> bool:
    letters = _in_range(word | U(0x20) * _ONES, U(ord("a")), U(ord("f")))
    return (_in_range(word, _ZERO, _NINE) | letters) == _HIGH_BITS


@inlined
def _hexadecimal(word: U) -> U:
    """Value of 8 characters: each byte becomes its digit's value, and three rounds put neighbours together."""
    word = (word & _NIBBLES) + ((word >> U(6)) & _ONES) * U(9)
    word = ((word << U(4)) | (word >> U(8))) & _PAIRS
    word = ((word << U(8)) | (word >> U(16))) & _QUADS
    return ((word << U(16)) | (word >> U(32))) & U(0xFFFFFFFF)


@inlined
def _digits(word: U, end: U) -> tuple[U, U]:
    """Return the characters before the first `end`, less "0" each, zeros ahead of them, and how many they are."""
    others = word ^ end * _ONES
    ends = ((others - _ONES) & ~others & _HIGH_BITS) >> U(7)  # the lowest bit of the first byte that is `end`
    before = (ends - U(1)) & ~ends
    length = ((before & _ONES) * _ONES) >> U(56)
    return ((word ^ _ZERO * _ONES) & before) << ((U(64) - U(8) * length) & U(63)), length


@inlined
def _are_decimal(digits: U) -> bool:
    return ((digits | (digits + (U(0x7F) - U(9)) * _ONES)) & _HIGH_BITS) == U(0)


@inlined
def _decimal(digits: U) -> U:
    digits = (digits * U(10) + (digits >> U(8))) & _PAIRS
    digits = (digits * U(100) + (digits >> U(16))) & _QUADS
    return (digits * U(10_000) + (digits >> U(32))) & U(0xFFFFFFFF)


@compiled
def _long_decimal(at: U, limit: U) -> tuple[U, U]:
    """Read decimal digits one by one; returns the number, and where it ends or would exceed the limit."""
    value, tenth = U(0), limit // U(10)
    while True:
        digit = _byte(at) - _ZERO
        if digit > U(9) or value > tenth or (value == tenth and digit > limit - tenth * U(10)):
            return value, at
        value = value * U(10) + digit
        at += U(1)


@compiled
def _short_hexadecimal(at: U) -> tuple[U, U]:
    """Read up to 8 hexadecimal digits one by one; returns the number, and where it ends."""
    value, last = U(0), at + U(8)
    while at < last:
        digit = _byte(at) - _ZERO
        if digit > U(9):
            digit = (_byte(at) | U(0x20)) - U(ord("a")) + U(10)
            if digit < U(10) or digit > U(15):
                break
        value = value * U(16) + digit
        at += U(1)
    return value, at


@compiled
def _behind_unused(at: U) -> U:
    """Return where hexadecimal digits and minus signs end."""
    while True:
        letter = _byte(at) | U(0x20)
        is_digit = _byte(at) - _ZERO <= U(9) or _byte(at) == _MINUS
        if not (is_digit or U(ord("a")) <= letter <= U(ord("f"))):
            return at
        at += U(1)
