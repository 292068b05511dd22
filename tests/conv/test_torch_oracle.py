"""PyTorch's own test data for Conv1d and ConvTranspose1d: OpInfo samples, error inputs, module tests, ModuleInfo inputs."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from max.graph import Graph, TensorType
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_nn import get_new_module_tests, module_tests

from harness import HOST, Array, Case, check, check_reference, dtype_of, ids, is_one_sentence, run
from max_conv import conv1d

(OP,) = (op for op in op_db if op.name == "nn.functional.conv1d")
(TRANSPOSED,) = (op for op in op_db if op.name == "nn.functional.conv_transpose1d")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OUT_OF_SCOPE = {
    torch.int64: "MAX models compute in floating point; torch itself has integer convolution on the CPU only",
    torch.complex32: "MAX has no complex dtype",
    torch.complex64: "MAX has no complex dtype",
    torch.complex128: "MAX has no complex dtype",
}
NCL = {"layout": "NCL", "filter_layout": "FCS"}
NCL_TRANSPOSED = {"layout": "NCL", "filter_layout": "CFS"}


def single(value: Any) -> Any:
    """Unwraps torch's 1-tuples: `conv1d` accepts ints, and a pair of paddings is (left, right)."""
    return value[0] if isinstance(value, tuple | list) and len(value) == 1 else value


def arguments(kwargs: dict[str, Any], layouts: dict[str, str] = NCL) -> dict[str, Any]:
    return {name: single(value) for name, value in kwargs.items()} | layouts


def op_cases() -> Iterator[Case]:
    for op in (OP, TRANSPOSED):
        transposed = op is TRANSPOSED
        for dtype in DTYPES:
            torch.manual_seed(0)
            for i, sample in enumerate(op.sample_inputs("cpu", dtype)):
                x, (w, bias), kwargs = sample.input, sample.args, sample.kwargs
                exact = op(x.double(), w.double(), None if bias is None else bias.double(), **kwargs)
                yield Case(
                    f"op-{'transposed-' * transposed}{str(dtype)[6:]}-{i}",
                    x,
                    w,
                    bias,
                    arguments(kwargs, NCL_TRANSPOSED if transposed else NCL),
                    expected=exact,
                    peer=op(x, w, bias, **kwargs),
                    transposed=transposed,
                )


def module_case(name: str, module: Any, x: torch.Tensor) -> Case:
    """Makes a case of a torch layer, its weights and an input of the dtype that they have."""
    with torch.no_grad():
        peer = module(x)
        exact = copy.deepcopy(module).double()(x.double())
    kwargs: dict[str, Any] = dict(
        stride=module.stride, padding=module.padding, dilation=module.dilation, groups=module.groups
    )
    transposed = isinstance(module, torch.nn.ConvTranspose1d)
    if transposed:
        kwargs |= {"output_padding": module.output_padding} | NCL_TRANSPOSED
    else:
        kwargs |= {"padding_mode": module.padding_mode} | NCL
    given = arguments(kwargs, {})
    return Case(name, x, module.weight, module.bias, given, expected=exact, peer=peer, transposed=transposed)


def new_module_rows() -> list[dict[str, Any]]:
    rows = [*get_new_module_tests(), *module_tests]
    names = ("Conv1d", "ConvTranspose1d")
    return [row for row in rows if row.get("fullname", row.get("module_name", "")).startswith(names)]


def module_cases() -> Iterator[Case]:
    for row in new_module_rows():
        name = row.get("fullname") or "_".join(filter(None, [row["module_name"], row.get("desc")]))
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            kind = torch.nn.ConvTranspose1d if name.startswith("ConvTranspose1d") else torch.nn.Conv1d
            make = row.get("constructor") or (lambda row=row, kind=kind: kind(*row["constructor_args"]))
            module = make().to(dtype)
            assert type(module) is kind, row
            yield module_case(f"row-{name}-{str(dtype)[6:]}", module, torch.randn(row["input_size"], dtype=dtype))


def module_info_cases() -> Iterator[Case]:
    names = [f"nn.{lazy}{kind}" for lazy in ("", "Lazy") for kind in ("Conv1d", "ConvTranspose1d")]
    infos = [info for info in module_db if info.name in names]
    for info in infos:
        assert set(info.dtypes) <= {*DTYPES, *OUT_OF_SCOPE}
        for dtype in (known for known in DTYPES if known in info.dtypes):
            options = dict(device="cpu", dtype=dtype, requires_grad=False, training=False)
            torch.manual_seed(0)
            for i, given in enumerate(info.module_inputs_func(info, **options)):
                call = given.constructor_input
                module = info.module_cls(*call.args, **call.kwargs).to(dtype)
                (x,) = given.forward_input.args
                module(x)  # a lazy layer gets its channels
                yield module_case(f"info-{info.name}-{str(dtype)[6:]}-{i}", module, x)


CASES = [*op_cases(), *module_cases(), *module_info_cases()]


@pytest.fixture(scope="module")
def results() -> dict[str, Array]:
    return dict(zip(ids(CASES), run(CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_case(case: Case, results: dict[str, Array]) -> None:
    check_reference(case)
    check(case, results[case.id])


def test_nothing_is_left_out() -> None:
    assert len([c for c in CASES if c.id.startswith("op-")]) == (10 + 10) * len(DTYPES)
    assert len([c for c in CASES if c.id.startswith("row-")]) == (17 + 4) * 2
    assert len([c for c in CASES if c.id.startswith("info-")]) == (8 + 4) * 2
    assert len([c for c in CASES if c.transposed]) == 10 * len(DTYPES) + 4 * 2 + 4 * 2
    assert {c.kwargs.get("padding_mode") for c in CASES} >= {"zeros", "reflect", "replicate", "circular"}
    assert {c.kwargs.get("padding") for c in CASES} >= {"same", "valid"}
    assert any(c.x.ndim == 2 for c in CASES)


def test_every_dtype_is_in_or_out_of_scope() -> None:
    for op in (OP, TRANSPOSED):
        assert {*op.dtypes, *op.dtypesIfCUDA, *op.dtypesIfROCM} == {*DTYPES, *OUT_OF_SCOPE}
    assert TRANSPOSED.error_inputs_func is None, "PyTorch has error inputs for conv_transpose1d now: test them, too"
    with graph_of(torch.ones(1, 3, 8, dtype=torch.int64), torch.ones(2, 3, 3, dtype=torch.int64)) as graph:
        with pytest.raises(
            TypeError, match="conv1d: the dtype of x must be one of float32, float64, float16, bfloat16, but is int64"
        ):
            conv1d(*[value.tensor for value in graph.inputs], layout="NCL", filter_layout="FCS")


# torch's error inputs, in its order: torch's message, ours, and the change if MAX cannot express the same.
FLOAT32_BIAS = "MAX has no complex dtype: a float32 bias breaks the same rule"
ERRORS: list[tuple[str, str, str | None]] = [
    ("should be the same", "x must be one of", None),
    ("should be the same", "x is float64 but the bias is float32", FLOAT32_BIAS),
    ("non-positive stride is not supported", "stride must be at least 1, but is -1", None),
    ("negative padding is not supported", "padding must not be negative, but is -1", None),
    ("dilation should be greater than zero", "dilation must be at least 1, but is -1", None),
    ("weight should have at least three dimensions", "the filter must have 3 axes (FCS)", None),
    ("expected weight to be at least 3 at dimension 0", "groups=3 must divide the 2 filters", None),
    ("expected weight to be at least 3 at dimension 0", "groups=3 must divide the 2 filters", None),
    ("non-positive groups is not supported", "groups must be at least 1, but is -1", None),
    ("non-positive groups is not supported", "groups must be at least 1, but is 0", None),
]


def graph_of(*tensors: torch.Tensor) -> Graph:
    return Graph("errors", input_types=[TensorType(dtype_of(t), list(t.shape), HOST) for t in tensors])


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_error_input(number: int) -> None:
    theirs, ours, changed = ERRORS[number]
    inputs = list(OP.error_inputs("cpu"))
    assert len(inputs) == len(ERRORS)
    given = inputs[number]
    assert given.error_regex == theirs
    sample = given.sample_input
    operands = [sample.input, *sample.args]
    with pytest.raises(given.error_type, match=theirs):
        OP(*operands, **sample.kwargs)
    if changed:
        assert operands[2].dtype.is_complex
        operands[2] = operands[2].real.float()
    with graph_of(*operands) as graph:
        with pytest.raises((TypeError, ValueError), match=re.escape(ours)) as caught:
            conv1d(*[value.tensor for value in graph.inputs], **arguments(sample.kwargs))
    assert is_one_sentence(str(caught.value)), str(caught.value)
