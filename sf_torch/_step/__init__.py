"""One step, from the counters of a group to the arrays.

Read downwards; each file calls only those below it:

    schedule        lr_k, bias corrections and averaging weights, from the counters
    numbers         the record of a step's numbers, which all arithmetic reads
    dispatch        decides which executor moves which parameters, and keeps the answer
    fused           executor: one Triton launch over all parameters
    eager           executor: PyTorch's kernels over lists of tensors
    formula         executor: the step as the formulas stand; the others are tested
                    against it, and torch.compile takes it
    rounding        random bits, for what the formula writes into bfloat16 arrays
    batches         which tensors go together: data only
    modes           exchanges y for x in the parameters, and x for y
"""
