"""Adapters between hesscurv and other libraries, imported as ``hesscurv.integrations``.

Each module adapts one library and imports it only when it is used, so that importing this package
needs none of them.
"""
