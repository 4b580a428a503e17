"""`trine tokenizer`."""

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def callback() -> None:
    """Placeholder while the room behind it is built."""
