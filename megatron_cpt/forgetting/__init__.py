"""What keeps a model near its base model while it learns new text.

vocab_parallel_kl.py   Kullback-Leibler divergence over a vocabulary that is cut over tensor-parallel ranks
reference.py           the frozen base model: its forward passes under the layout of the run
kl.py                  the loss term made of both
"""
