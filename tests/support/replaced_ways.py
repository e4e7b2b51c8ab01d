"""Ways of computing that tests put in the place of the library's own."""

from dataclasses import replace

from hesscurv.operators.hessian import HessianCurvature

LINEARIZE = {way.name: way.linearize for way in HessianCurvature.ways}


def replace_way(monkeypatch, name, linearize, operator=None):
    """Let one of the Hessian's ways set products up by another function of loss and parameters.

    In an operator that is built already, or in all that are built from here on.
    """
    if operator is not None:
        ways = operator.products.local._ways
        monkeypatch.setitem(ways, name, replace(ways[name], linearize=linearize))
        return
    ways = tuple(
        replace(way, linearize=linearize) if way.name == name else way
        for way in HessianCurvature.ways
    )
    monkeypatch.setattr(HessianCurvature, "ways", ways)
