"""The operations, one a file: public functions, autograd, and operators for torch.compile and torch.export."""
