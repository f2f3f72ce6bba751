"""The commands for conversations with a model: chat and serve."""

from typing import Annotated

import typer

from tunekit.commands.options import Base, Device, Penalties, TargetKeys, TargetName

app = typer.Typer(rich_markup_mode=None)


@app.command()
def chat(
    target: TargetName,
    overrides: TargetKeys = None,
    base: Base = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="an additional adapter of this base; may be repeated")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="the system prompt")] = None,
    history: Annotated[
        str | None, typer.Option(metavar="FILE", help="load the conversation from FILE and save it there")
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0: always the most likely token")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="P", min=0, max=1, help="sample from the most likely tokens with total probability P"),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(metavar="K", min=0, help="sample from the K most likely tokens; 0: from all")
    ] = 0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="the seed of sampling")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="the maximum length of an answer; default: 512")
    ] = None,
    penalty: Penalties = None,
    device: Device = None,
) -> None:
    """Start a conversation with a run, an adapter or a model. /base asks the base model, /help lists the commands.

    A run of an embedding model searches the documents of its rows.
    """
    from tunekit.chat import chat_verb

    sampling = (temperature, top_p, top_k, seed)
    chat_verb(target, base, overrides or [], adapter or [], system, history, sampling, max_new_tokens, penalty or [])


@app.command()
def serve(
    target: TargetName,
    overrides: TargetKeys = None,
    base: Base = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="an additional adapter, or a folder of adapters, which may change while serve runs; each "
            "adapter is a model name",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="the address to listen on; if other machines can reach it, --api-key is required"
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65535, help="the port to listen on")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="the key of clients; default: $TUNEKIT_API_KEY")
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="the maximum number of tokens of an answer, if the client sets no limit"),
    ] = 512,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="the number of answers generated, or texts embedded, together")
    ] = 8,
    cache_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="the memory for keys and values, which limits the tokens of each answer; default: a quarter of the "
            "free memory",
        ),
    ] = None,
    adapter_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="the memory for adapters, such as 2GiB; the least recently used ones are evicted; default: a quarter "
            "of the free memory",
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Serve a run, an adapter or a model to clients of OpenAI's API.

    Each adapter is a model name. Adapters in a folder are loaded when they are first used.
    """
    from tunekit.serve import serve_verb

    memory = cache_memory, adapter_memory
    serve_verb(target, base, overrides or [], adapter or [], host, port, api_key, max_new_tokens, batch_size, memory)
