"""Which program of the Hopper kernel computes what, in which order: integer functions, for the kernel and for tests.

A tile is 128 queries of one head of one row of the batch. There are as many programs as multiprocessors, and each
computes a list of tiles that it knows from its number alone: no counter in memory, so that a run repeats itself.

- All tiles are in a list. Heads come some at a time, so many that their keys and values stay in the L2 cache while
  their tiles run; among those, tiles of later queries come first, for under a causal mask they are the longest.
- Under a causal mask the list is cut into sections, those heads each. A section is dealt out to the programs to and fro
  (0 1 2 | 2 1 0 | 0 1 2), every other section beginning with the last program, so that nobody gets the longest tile of
  every round: 8192 queries come within 1 % of an even share. Under other masks programs take tiles in turn.

Every function is jitted for the kernel; `gluon_simulator.plain` makes it plain Python.
"""

from __future__ import annotations

from trine.kernels.gluon_names import gl, gluon


@gluon.jit
def place_in_round(turn, program, num_programs):
    """The place of a program in a round of tiles: to in even turns, fro in odd ones."""
    return program + (turn % 2) * (num_programs - 1 - 2 * program)


@gluon.jit
def steps_in_section(section, program, num_programs, num_tiles):
    """How many of a section's tiles a program has: whole rounds, and perhaps one of the last, incomplete round."""
    rounds = num_tiles // num_programs
    place = place_in_round(section + rounds, program, num_programs)
    return rounds + min(max(num_tiles % num_programs - place, 0), 1)


@gluon.jit
def num_steps(program, num_programs, section_tiles, num_tiles):
    """How many tiles a program has; sections have `section_tiles` (at least one a program), the last may have fewer."""
    before = (num_tiles - 1) // section_tiles
    even = steps_in_section(0, program, num_programs, section_tiles)
    odd = steps_in_section(1, program, num_programs, section_tiles)
    last = steps_in_section(before, program, num_programs, num_tiles - before * section_tiles)
    return before // 2 * (even + odd) + before % 2 * even + last


@gluon.jit
def next_tile(section, turn, program, num_programs, section_tiles):
    """The place in the list of a program's next tile, with its section and the turn after it; both begin at 0.

    Turns of a section are used up where they pass its end. A program remembers the two instead of counting its tiles,
    because what they would be computed from takes registers.
    """
    over = min(
        max(turn * num_programs + place_in_round(section + turn, program, num_programs) - section_tiles + 1, 0), 1
    )
    section = section + over
    turn = turn * (1 - over)
    place = place_in_round(section + turn, program, num_programs)
    return section * section_tiles + turn * num_programs + place, section, turn + 1


@gluon.jit
def tile_place(index, num_row_tiles, num_heads, heads_at_once):
    """(number of the tile among those of its head, head) of a place in the list; heads count over the batch as well."""
    group = index // (heads_at_once * num_row_tiles)
    first = group * heads_at_once
    heads = min(heads_at_once, num_heads - first)
    rest = index - first * num_row_tiles
    return num_row_tiles - 1 - rest // heads, first + rest % heads


@gluon.jit
def key_blocks(low, high, num_keys, BLOCK_N: gl.constexpr):
    """Blocks of keys [begin, end) of a tile: `low` of its first query, `high` of its last. Never empty or beyond S."""
    begin = min(low // BLOCK_N, (num_keys - 1) // BLOCK_N)
    return begin, max((high + BLOCK_N - 1) // BLOCK_N, begin + 1)


@gluon.jit
def whole_blocks(low, high, begin, end, BLOCK_N: gl.constexpr):
    """Blocks [begin, end) that need no mask: `low` of the last query, `high` of the first.

    The last block is not among them: it is computed outside the loops, masked always. The others fall into three
    ranges: begin <= whole_begin <= whole_end <= end - 1.
    """
    whole_end = min(high // BLOCK_N, end - 1)
    whole_begin = max(min((low + BLOCK_N - 1) // BLOCK_N, whole_end), begin)
    return whole_begin, whole_end
