"""A variational auto-encoder that reads and writes images row by row (after Gregor et al. 2015, arXiv:1502.04623).

The cells are made of nn.Linear layers, so that these can be pruned and exchanged like any others. What does not hang on
the step before is one large layer for all rows: what enters the gates, and what makes rows of the hidden states.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

State: TypeAlias = tuple[Tensor, ...]
"""What a cell carries from step to step, each [N, hidden]; the first is its output."""


class GRUCell(nn.Module):
    """One step of a gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), with torch.nn.GRU's equations.

    input, hidden: the weights of torch.nn.GRU, gates r, z, n one behind the other.
    """

    CARRIES = 1

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(inputs, 3 * hidden), nn.Linear(hidden, 3 * hidden)

    def forward(self, entering: Tensor, state: State) -> State:
        """The next state; entering: what `input` made of this step's input, [N, 3 * hidden]."""
        (h,) = state
        size = h.shape[1]
        hidden_rz, hidden_n = self.hidden(h).split([2 * size, size], 1)
        entering_rz, entering_n = entering.split([2 * size, size], 1)
        r, z = torch.sigmoid(entering_rz + hidden_rz).chunk(2, 1)
        n = torch.tanh(torch.addcmul(entering_n, r, hidden_n))
        return (torch.lerp(n, h, z),)


class LSTMCell(nn.Module):
    """One step of long short-term memory (Hochreiter and Schmidhuber 1997), with torch.nn.LSTM's equations.

    input, hidden: the weights of torch.nn.LSTM, gates i, f, g, o one behind the other. Carries h and c.
    """

    CARRIES = 2

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(inputs, 4 * hidden), nn.Linear(hidden, 4 * hidden)

    def forward(self, entering: Tensor, state: State) -> State:
        """The next state; entering: what `input` made of this step's input, [N, 4 * hidden]."""
        h, c = state
        i, f, g, o = (entering + self.hidden(h)).chunk(4, 1)
        c = torch.addcmul(torch.sigmoid(f) * c, torch.sigmoid(i), torch.tanh(g))
        return torch.sigmoid(o) * torch.tanh(c), c


Cell: TypeAlias = Literal["gru", "lstm"]
_CELLS: dict[Cell, type[GRUCell] | type[LSTMCell]] = {"gru": GRUCell, "lstm": LSTMCell}


def _cell(kind: Cell, inputs: int, hidden: int) -> GRUCell | LSTMCell:
    if kind not in _CELLS:
        raise ValueError(f"cell is {' or '.join(map(repr, _CELLS))}, got {kind!r}")
    return _CELLS[kind](inputs, hidden)


class RecurrentEncoder(nn.Module):
    """Encoder from images [N, C, H, W], read from the top row down, to mean and log-variance, [N, 2 * latent].

    row: the numbers in a row of all channels, C * W. Raises ValueError for another cell than "gru" and "lstm".
    """

    def __init__(self, latent: int = 16, row: int = 28, hidden: int = 512, cell: Cell = "gru") -> None:
        super().__init__()
        self.cell = _cell(cell, row, hidden)
        self.moments = nn.Linear(hidden, 2 * latent)
        self.hidden = hidden

    def forward(self, images: Tensor) -> Tensor:
        rows = images.transpose(1, 2).flatten(2)
        entering = self.cell.input(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        state: State = (entering.new_zeros(images.shape[0], self.hidden),) * self.cell.CARRIES
        for step in entering.unbind(1):
            state = self.cell(step, state)
        moments: Tensor = self.moments(state[0])
        return moments


class RecurrentDecoder(nn.Module):
    """Decoder from codes [N, latent] to images [N, C, H, W] in [-1, 1], image_shape being (C, H, W).

    The code makes the first state and enters the gates at every step; rows are not fed back, so that all of them are
    made of the hidden states at once. Below 512 `hidden`, calling a layer costs about as much as what sparsity saves of it.
    Raises ValueError for another cell than "gru" and "lstm".
    """

    def __init__(
        self,
        latent: int = 16,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        hidden: int = 512,
        cell: Cell = "gru",
    ) -> None:
        super().__init__()
        channels, self.height, width = image_shape
        self.cell = _cell(cell, latent, hidden)
        self.initial = nn.Linear(latent, self.cell.CARRIES * hidden)
        self.row = nn.Linear(hidden, channels * width)
        self.row_shape = (channels, width)

    def forward(self, z: Tensor) -> Tensor:
        entering = self.cell.input(z)
        state: State = torch.tanh(self.initial(z)).chunk(self.cell.CARRIES, 1)
        outputs = []
        for _ in range(self.height):
            state = self.cell(entering, state)
            outputs.append(state[0])
        rows = torch.tanh(self.row(torch.stack(outputs, 1).flatten(0, 1)))
        return rows.unflatten(0, (-1, self.height)).unflatten(2, self.row_shape).transpose(1, 2)
