"""Training of Bard-VL: noise, packed rows, losses, data, trainers and the two entry points.

`python -m bard_vl.training.merge_blocks` and `python -m bard_vl.training.distill` run recipes; the modules beside them
are of use on their own.
"""
