"""The run-time description of one convolution, and the halo around its input."""

comptime ZEROS = 0
comptime REFLECT = 1
comptime REPLICATE = 2
comptime CIRCULAR = 3


@always_inline
def source(mode: Int, length: Int, p: Int) -> Int:
    """Returns which row of a signal of `length` rows is at position `p` of the padded signal, or -1 for zeros."""
    var q = p
    if mode == REFLECT:
        if q < 0:
            q = -q
        if q >= length:
            q = 2 * (length - 1) - q
    elif mode == REPLICATE:
        q = max(0, min(q, length - 1))
    elif mode == CIRCULAR:
        if q < 0:
            q += length
        elif q >= length:
            q -= length
    return q if q >= 0 and q < length else -1


@fieldwise_init
struct Geometry(ImplicitlyCopyable, TrivialRegisterPassable):
    """Sizes of one convolution. Groups divide channels and filters equally."""

    var batch: Int
    var length: Int
    var out_length: Int
    var channels: Int  # of the input, all groups
    var filters: Int  # output channels, all groups
    var groups: Int
    var kernel: Int
    var stride: Int
    var dilation: Int
    var pad_left: Int
    var mode: Int

    @always_inline
    def group_channels(self) -> Int:
        return self.channels // self.groups

    @always_inline
    def group_filters(self) -> Int:
        return self.filters // self.groups

    @always_inline
    def source(self, p: Int) -> Int:
        """Returns the input row at position `p`, or -1 if the row is zero. Positions in the left padding are negative.

        Positions after both the input and its padding (lanes that are computed but never stored) are zero
        as well, so that no caller can read outside the input.
        """
        return source(self.mode, self.length, p)

    @always_inline
    def first_tap(self, first: Int, count: Int) -> Int:
        """Returns the first tap that meets data in outputs `first .. first + count - 1`."""
        var last = (first + count - 1) * self.stride - self.pad_left
        if self.mode != ZEROS or last >= 0:  # the most common case, without a division
            return 0
        return min(self.kernel, max(0, (self.dilation - 1 - last) // self.dilation))

    @always_inline
    def end_tap(self, first: Int) -> Int:
        """Returns one past the last tap that meets data in outputs from `first` on."""
        var room = self.length - 1 - (first * self.stride - self.pad_left)
        if self.mode != ZEROS or room >= (self.kernel - 1) * self.dilation:
            return self.kernel
        return max(0, min(self.kernel, room // self.dilation + 1))
