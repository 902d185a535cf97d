"""The three ops: rnn, conv_transpose, adversarial. Each room has the same plan.

equations.py       the mathematics in plain torch: any device, any dtype, any order of differentiation
op.py              the schema, the fake and the autograd rule
backends.py        one class per backend: what it cannot do, where it was measured faster, and the call
triton_kernels.py  the Triton kernels
"""
