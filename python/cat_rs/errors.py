"""Exceptions of cat_rs. Each also is the builtin exception that a caller of PyTorch would expect."""


class CatRsError(Exception):
    """Base of every error that cat_rs raises."""


class ShapeError(CatRsError, ValueError):
    """A tensor has another shape than the operation needs."""


class DtypeError(CatRsError, TypeError):
    """A tensor has a dtype that the operation does not handle."""


class DeviceError(CatRsError, ValueError):
    """A tensor is on a device that the operation does not handle."""


class LayoutError(CatRsError, ValueError):
    """A tensor has a memory layout that the operation does not handle."""


class InvalidValueError(CatRsError, ValueError):
    """A value is outside its domain."""


class KernelError(CatRsError, RuntimeError):
    """libtorch or the operating system failed inside an operation."""


class AdapterError(CatRsError, ValueError):
    """A model has no adapter, or one that cannot be used as asked."""
