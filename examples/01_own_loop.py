"""Train a sparse network in a custom training loop. Requires only torch and takes a few seconds.

A small network learns the sign of the scalar product of two vectors of 8 inputs; the other 240 of its 256 inputs are
noise. STR learns the sparsity per layer.
"""

import torch
from torch import nn
from torch.nn import functional as F

import sparing

torch.manual_seed(0)
inputs = torch.randn(4096, 256)
labels = ((inputs[:, :8] * inputs[:, 8:16]).sum(dim=1) > 0).long()
train, test = slice(0, 3584), slice(3584, None)

model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 2))

sparsifier = sparing.sparsify_(model, sparing.STR(init=-8.0))
groups = sparing.param_groups(model, weight_decay=1e-3, threshold_weight_decay=0.01)
optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
sparsifier.attach(optimizer)

for _ in range(20):
    for batch in torch.randperm(3584).split(64):
        loss = F.cross_entropy(model(inputs[train][batch]), labels[train][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

accuracy = (model(inputs[test]).argmax(dim=1) == labels[test]).float().mean().item()
print(sparing.report(model, input_size=(1, 256)))
print(f"test accuracy {100 * accuracy:.1f} %")

sparing.densify_(model)  # ordinary torch modules again, zeros included
torch.save(model.state_dict(), "own_loop.pt")
