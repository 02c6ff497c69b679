"""On a CPU PyTorch's own operators: beside a layer's products they are nothing there."""

from ...library import implement
from .reference import choose_rows, choose_rows_backward

implement("choose_rows", "cpu")(choose_rows)
implement("choose_rows_backward", "cpu")(choose_rows_backward)
