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
    if not text:
        return None
    names: dict[str, None] = {}
    try:
        expression = condition(ast.parse(text.strip(), mode="eval").body, names)
    except (SyntaxError, OverflowError, RecursionError) as error:
        refuse(getattr(error, "offset", None) or 1, getattr(error, "msg", error))
    return Where(list(names), expression) if names else refuse(1, "it names no column")


def refuse(place, why) -> Any:
    remedy = (
        "write comparisons of columns with numbers or texts, and, or, not, in: language_score > 0.9 and dump != 'x'"
    )
    raise SourceError(f"where: character {place}: {why}; {remedy}")


def condition(node, names):
    match node:
        case ast.BoolOp(op=op, values=values):
            join = operator.and_ if isinstance(op, ast.And) else operator.or_
            return functools.reduce(join, [condition(value, names) for value in values])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~condition(operand, names)
        case ast.Compare(left=left, ops=ops, comparators=others):
            parts = [compare(*part, names) for part in zip([left, *others], ops, others, strict=False)]
            return functools.reduce(operator.and_, parts)
        case ast.Name() | ast.Attribute():  # a column of true and false
            return operand_of(node, names)
    refuse(node.col_offset + 1, f"{ast.unparse(node)} is not a comparison")


def compare(left, op, right, names):
    if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.Tuple | ast.List | ast.Set) and right.elts:
        found = [operand_of(left, names) == operand_of(item, names) for item in right.elts]
        among = functools.reduce(operator.or_, found)
        return among if isinstance(op, ast.In) else ~among
    if type(op) not in COMPARISONS:
        refuse(right.col_offset + 1, f"{ast.unparse(right)} cannot be compared like this")
    return COMPARISONS[type(op)](operand_of(left, names), operand_of(right, names))


def operand_of(node, names):
    import pyarrow.compute as pc

    text = ast.unparse(node)
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return pc.scalar(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return pc.scalar(-value)
        case ast.Name() | ast.Attribute() if text.replace(".", "").isidentifier():
            names[text] = None
            return pc.field(text)
    refuse(node.col_offset + 1, f"{text} is not a column, a number or a text")
