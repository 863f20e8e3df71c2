"""Training of Bard-VL: noise, packed rows, losses, data, trainers and the entry points.

`python -m bard_vl.training.merge_blocks` and `python -m bard_vl.training.distill` run recipes, and
`python -m bard_vl.training.merge_and_distill` one of each in turn; the modules beside them are of use on their own.
"""
