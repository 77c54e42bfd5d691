"""--where: which rows are taken, such as 'language_score > 0.9 and token_count > 50', as an expression of pyarrow.

    where = parse_where("meta.score > 0.9")
    rows = where.rows({name: array for each of where.names})  # numbers of the rows for which it is true

The text is parsed and never executed. As in pyarrow, a comparison with a value that is missing is not true.
"""

import ast
import functools
import operator
from typing import Any, NamedTuple

from onecard.remote import SourceError

COMPARISONS: dict[type, Any] = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
COMPARISONS |= {ast.Eq: operator.eq, ast.NotEq: operator.ne}


class Where(NamedTuple):
    names: list[str]  # of the columns; meta.score is the field score of the column meta
    expression: Any

    def rows(self, columns: dict) -> list[int]:
        """The rows that are taken. columns: {name: pyarrow array}. Raises pyarrow's error for types that do not fit."""
        import pyarrow as pa

        table = pa.table(columns | {"": pa.array(range(len(columns[self.names[0]])))})
        return table.filter(self.expression)[""].to_pylist()


@functools.cache
def parse_where(text: str) -> Where | None:
    """None: all rows. Raises SourceError with the place of what is not a comparison of columns, numbers and texts."""
    names: dict[str, None] = {}
    try:
        expression = build(ast.parse(text.strip(), mode="eval").body, names) if text else None
    except (SyntaxError, OverflowError, RecursionError) as error:
        refuse(getattr(error, "offset", 1) or len(text), getattr(error, "msg", error))
    return Where(list(names), expression) if names else refuse(1, "it names no column") if text else None


def refuse(place, why) -> Any:
    remedy = (
        "write comparisons of columns with numbers or texts, and, or, not, in: language_score > 0.9 and dump != 'x'"
    )
    raise SourceError(f"where: character {place}: {why}; {remedy}")


def build(node, names):
    """The expression of a syntax tree. Adds the columns to `names`."""
    import pyarrow.compute as pc

    text = ast.unparse(node)
    match node:
        case ast.BoolOp(op=op, values=values):
            join = operator.and_ if isinstance(op, ast.And) else operator.or_
            return functools.reduce(join, [build(value, names) for value in values])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~build(operand, names)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return pc.scalar(-value)
        case ast.Compare(left=left, ops=ops, comparators=others):
            parts = [compare(*part, names) for part in zip(ops, [left, *others], others, strict=False)]
            return functools.reduce(operator.and_, parts)
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return pc.scalar(value)
        case ast.Name() | ast.Attribute() if text.replace(".", "").isidentifier():
            names[text] = None
            return pc.field(text)
    refuse(node.col_offset + 1, f"{text} is not understood")


def compare(op, left, right, names):
    if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.Tuple | ast.List) and right.elts:
        among = functools.reduce(operator.or_, [compare(ast.Eq(), left, item, names) for item in right.elts])
        return among if isinstance(op, ast.In) else ~among
    if type(op) not in COMPARISONS:
        refuse(right.col_offset + 1, f"{ast.unparse(right)} cannot be compared like this")
    return COMPARISONS[type(op)](build(left, names), build(right, names))
