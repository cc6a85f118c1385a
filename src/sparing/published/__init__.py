"""Published budgets, as data: a row a layer, a column a budget, sparsity in [0, 1].

`resnet50.csv` holds, to the published two decimals of a percent, the 16 budgets that STR learned for
ResNet-50 on ImageNet (`resnet50-str-79.55` to `resnet50-str-99.10`, named by their total in percent),
and six ways to spend 90 %: `resnet50-str-90`, `-uniform-90`, `-erk-90`, `-snfs-90`, `-vd-90` and
`-gs-90` (global magnitude).

Source: the repository RAIVNLab/STR, folder budgets/, of Kusupati et al., ICML 2020.
"""
