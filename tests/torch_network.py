"""Writes torch_network.json: a small network of PyTorch, its outputs, and its state after two training steps.

Run it with PyTorch, which the tests do without: `python tests/torch_network.py`.
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("torch_network.json")
RATE, MOMENTUM = 0.05, 0.1


def make(torch):
    """A convolution with a stride, a residual block with groups, one transposed, and two dense layers."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
            self.bn1 = nn.BatchNorm2d(4, momentum=MOMENTUM)
            self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(4, momentum=MOMENTUM)

        def forward(self, x):
            y = nn.functional.relu(self.bn1(self.conv1(x)))
            return nn.functional.relu(self.bn2(self.conv2(y)) + x)

    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4, momentum=MOMENTUM), nn.ReLU(), Block()),
        *(nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)),
        *(nn.BatchNorm1d(5, momentum=MOMENTUM), nn.Linear(5, 5)),
    )


def record(torch):
    """What goes into the file: arrays of the network before and after, of its inputs and of its outputs."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net = make(torch)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.ndim:  # short decimals, and statistics that a wrong use of would show
                tensor += 0.5 * torch.rand(tensor.shape) if "running" in name else 0.1 * torch.randn(tensor.shape)
                tensor.copy_(torch.round(tensor * 64) / 64)
    batches = [np.round(rng.standard_normal((6, 3, 4, 4)) * 64) / 64 for _ in range(2)]
    x = torch.tensor(np.float32(batches[0]))
    found = {"version": torch.__version__, "rate": RATE, "batches": batches, "before": arrays(net)}
    found["outputs_before"] = net.eval()(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    net.train()
    for batch in batches:
        optimizer.zero_grad()
        torch.mean((net(torch.tensor(np.float32(batch))) - 1) ** 2).backward()
        optimizer.step()
    return found | {"after": arrays(net), "outputs_after": net.eval()(x)}


def arrays(net):
    return {name: tensor.detach().numpy().copy() for name, tensor in net.state_dict().items()}


def plain(value):
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if hasattr(value, "detach"):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return np.vectorize(lambda number: float(f"{number:.8g}"), otypes=[float])(value).tolist()
    return value


if __name__ == "__main__":
    import torch

    FILE.write_text(json.dumps(plain(record(torch)), separators=(",", ":")) + "\n")
