"""How the work of a layer is cut into tasks; `by_chunks` is for kernels that first rearrange the filters."""

from std.math import ceildiv

from .geometry import Geometry
from .lanes import Memory, Panels
from .tasks import phases


@fieldwise_init
struct Part(ImplicitlyCopyable, TrivialRegisterPassable):
    """`count` positions of a batch item, from `first` on, by the filters `filter .. end_filter - 1` of a group.

    A position is one output; in Winograd's kernel it is a quad of outputs.
    """

    var n: Int
    var group: Int
    var first: Int
    var count: Int
    var filter: Int
    var end_filter: Int

    @always_inline
    def lanes(self) -> Int:
        """Returns how many filters there are."""
        return self.end_filter - self.filter

    @always_inline
    def column(self, g: Geometry) -> Int:
        """Returns the number of the first filter, counted over all groups."""
        return self.group * g.group_filters() + self.filter

    @always_inline
    def after(self, positions: Int) -> Self:
        """Returns the part that is left after its first `positions` positions."""
        var rest = self
        rest.first += positions
        rest.count -= positions
        return rest

    @always_inline
    def by(self, filter: Int, lanes: Int) -> Self:
        """Returns the same positions by `lanes` filters, from `filter` on."""
        var part = self
        part.filter = filter
        part.end_filter = filter + lanes
        return part


@fieldwise_init
struct Grid(ImplicitlyCopyable, TrivialRegisterPassable):
    """Tasks of a layer. From one task to the next the filters change first, then the positions.

    Each kernel knows the sizes that suit it; how they become parts is the same for all.
    """

    var batch: Int
    var groups: Int
    var blocks: Int
    """Blocks of positions, as equal as `unit` allows."""
    var splits: Int
    """Parts into which a group's filters are split."""
    var unit: Int
    """A block is a multiple of so many positions."""
    var positions: Int
    var split: Int
    """Filters of a task."""
    var filters: Int

    @always_inline
    def tasks(self) -> Int:
        return self.batch * self.groups * self.blocks * self.splits

    def part(self, task: Int) -> Part:
        """Returns the part that a task computes."""
        var units = ceildiv(self.positions, self.unit)
        var row = task // self.splits
        var block = row % self.blocks
        var group = row // self.blocks
        var first = block * units // self.blocks * self.unit
        var end = min((block + 1) * units // self.blocks * self.unit, self.positions)
        var filter = task % self.splits * self.split
        return Part(
            n=group // self.groups,
            group=group % self.groups,
            first=first,
            count=end - first,
            filter=filter,
            end_filter=min(filter + self.split, self.filters),
        )


def by_chunks[
    dtype: DType, Prepare: def(Int, Int, Int, Memory[dtype]) -> None, Work: def(Part, Panels[dtype]) -> None, //
](g: Geometry, grid: Grid, chunk: Int, held: Panels[dtype], prepare: Prepare, pieces: Int, work: Work, threads: Int,):
    """Rearranges `chunk` panels of filters at a time, and computes with them before the next ones.

    Args:
        g: The layer.
        grid: The tasks of one group with one chunk's filters.
        chunk: Panels at a time.
        held: Where the rearranged panels are stored.
        prepare: Writes a piece of a panel: `prepare(group, first filter, piece, target)`.
        pieces: Pieces of a panel.
        work: Computes a part with the panels of a group; only the panels that the part needs are there.
        threads: How many threads are used.
    """
    for group in range(g.groups):
        for start in range(0, g.group_filters(), chunk * held.lanes):
            var end = min(start + chunk * held.lanes, g.group_filters())

            def lay_out(i: Int) {imm}:
                var filter = i // pieces * held.lanes
                prepare(group, start + filter, i % pieces, held.at(filter))

            def compute(i: Int) {imm}:
                var part = grid.part(i)
                part.group = group
                part.filter += start
                part.end_filter = min(part.end_filter + start, end)
                work(part, Panels[dtype](held.at(-start), held.lanes, held.rows))

            phases(lay_out, ceildiv(end - start, held.lanes) * pieces, compute, grid.tasks(), threads)
