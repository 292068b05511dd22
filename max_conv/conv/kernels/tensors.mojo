"""A graph's tensors as the kernels see them: their memory, their axes, and the numbers of a geometry."""

from extensibility import ManagedTensorSlice
from std.utils.index import IndexList

from .lanes import FilterSteps, Memory


@always_inline
def memory(tensor: ManagedTensorSlice) -> Memory[tensor.dtype]:
    """Returns where a tensor's values are stored. The caller keeps the tensor alive as long as the result is used."""
    return tensor.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()


struct Numbers(TrivialRegisterPassable):
    """The numbers that `conv/ops.py` writes into an operation's vector `geometry`, in this order.

    As scalars they would be part of a function's signature, and fewer layers of a graph would share their code.
    """

    var stride: Int
    var dilation: Int
    var pad_left: Int
    var pad_right: Int
    var mode: Int
    var groups: Int
    var kernel_size: Int

    @always_inline
    def __init__(out self, memory: Memory[DType.int64]):
        self.stride = Int(memory[unsafe_offset=0])
        self.dilation = Int(memory[unsafe_offset=1])
        self.pad_left = Int(memory[unsafe_offset=2])
        self.pad_right = Int(memory[unsafe_offset=3])
        self.mode = Int(memory[unsafe_offset=4])
        self.groups = Int(memory[unsafe_offset=5])
        self.kernel_size = Int(memory[unsafe_offset=6])


struct DataAxes[layout: StaticString]:
    """The axes of NLC or NCL data."""

    comptime nlc = Self.layout == "NLC"
    comptime length = 1 if Self.nlc else 2
    comptime channel = 3 - Self.length

    @always_inline
    @staticmethod
    def index(n: Int, position: Int, channel: Int) -> IndexList[3]:
        """Returns the index of a value."""
        comptime if Self.nlc:
            return IndexList[3](n, position, channel)
        else:
            return IndexList[3](n, channel, position)


struct FilterAxes[layout: StaticString]:
    """The axes of a filter. A filter that `conv/packing.py` rearranged is read as SCF, if it is read by axes at all."""

    comptime made = Self.layout == "packed" or Self.layout == "phased" or Self.layout == "phased FSC"
    comptime tap = 0 if Self.made else Self.layout.find("S")
    comptime channel = 1 if Self.made else Self.layout.find("C")
    comptime filter = 2 if Self.made else Self.layout.find("F")

    @staticmethod
    def steps(shape: IndexList[3]) -> FilterSteps:
        """Returns how far apart taps, channels and filters are."""
        var size = [shape[1] * shape[2], shape[2], 1]
        return FilterSteps(size[Self.tap], size[Self.channel], size[Self.filter])
