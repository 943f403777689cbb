"""What a pickle would make, told by its opcodes before any of it is made.

Knows the opcodes that ``torch.load(weights_only=True)`` takes and what each leaves on the stack; does not know what is in a
checkpoint.

**Tuples.** A tuple may be in another many times over, so that a few hundred bytes stand for exponentially many values. That
costs nothing until somebody looks at all of them, and torch does where such a tuple is the key of a dict: it is hashed. So one
that stands for more values than any checkpoint has in a tuple is refused, and what remains to hash grows with the file alone.
Lists and dicts may stand for as many, but have no hash; whoever looks into them afterwards has bounds (``stand_ins.py``).
"""

from __future__ import annotations

import pickletools
from typing import IO, Any

# Real ones are shapes, and what objects are made of.
_MOST_VALUES = 10_000
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_PUTS, _GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")


def check_tuples(stream: IO[bytes]) -> bool:
    """Look at one pickle, without making what it says.

    Args:
        stream: read to the pickle's end, where it has one.

    Returns:
        Whether it has an end. Where not, torch gets no further either, and says why.

    Raises:
        ValueError: a tuple stands for too many values.
    """
    # Of each object, how many values it stands for: 1 of all but tuples. Objects below a mark are out of reach until it is used.
    stack, below, memo = list[int](), list[list[int]](), dict[Any, int]()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "MARK":
                below.append(stack)
                stack = []
            elif opcode.name in _PUTS:
                memo[argument] = stack[-1]
            elif opcode.name in _GETS:
                stack.append(memo[argument])
            else:
                taken: list[int] = []
                popped = len(opcode.stack_before)
                if pickletools.markobject in opcode.stack_before:
                    taken, stack = stack, below.pop()
                    popped = opcode.stack_before.index(pickletools.markobject)
                for _ in range(popped):
                    taken.append(stack.pop())
                values = 1 + sum(taken) if opcode.name in _TUPLES else 1
                if values > _MOST_VALUES:
                    raise _TooManyError(f"has a tuple of more than {_MOST_VALUES} values; no model has")
                stack += [values] * len(opcode.stack_after)
    except _TooManyError:
        raise
    # Cut, no pickle at all, or one that takes what is not there.
    except (ValueError, IndexError, KeyError):
        return False
    return True


class _TooManyError(ValueError):
    """What a pickle is refused for, as against what is wrong with it."""
