"""Pages that mkdocs makes: executed tutorials, and the API reference from the docstrings."""

import pathlib

import griffe
import jupytext
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = pathlib.Path(__file__).parents[1]
KERNEL = Config(KernelManager={"transport": "ipc"})


def on_config(config: MkDocsConfig) -> None:
    """Leaves out guide pages that are not there, and adds the API reference to the navigation."""
    (guide,) = (section["Guide"] for section in config.nav if "Guide" in section)
    guide[:] = [page for page in guide if (ROOT / "docs" / next(iter(page.values()))).exists()]
    config.nav.append({"API reference": [{name: f"api/{name}.md"} for name in _packages()]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds a page for each package, and the output of its code to each tutorial."""
    for name, modules in _packages().items():
        text = f"# {name}\n\n::: {name}\n" + "".join(f"\n## {m}\n\n::: {m}\n" for m in modules)
        files.append(File.generated(config, f"api/{name}.md", content=text))
    for file in [file for file in files if file.src_uri.startswith("tutorials/")]:
        notebook = jupytext.reads(file.content_string, fmt="md")
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        NotebookClient(notebook, config=KERNEL, timeout=600).execute()
        source = file.src_uri.replace(".md", ".ipynb")
        link = f"[Download this page as a notebook.]({pathlib.PurePath(source).name})"
        title, *cells = map(_markdown, notebook.cells)
        files.remove(file)
        page = "\n\n".join([title, link, *cells])
        files.append(File.generated(config, file.src_uri, content=page))
        files.append(File.generated(config, source, content=nbformat.writes(notebook)))


class Docstrings(griffe.Extension):
    """Our section "Example:" by the name that griffe knows it by."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Renames the section in the docstring of any object."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")


def _packages() -> dict[str, list[str]]:
    """Names of the packages below wsbcn_flax, each with its modules that are public."""
    folders = sorted(file.parent for file in ROOT.glob("wsbcn_flax/**/__init__.py"))
    return {
        ".".join(folder.relative_to(ROOT).parts): [
            ".".join(file.relative_to(ROOT).with_suffix("").parts)
            for file in sorted(folder.glob("[a-z]*.py"))
        ]
        for folder in folders[1:]
    }


def _markdown(cell: nbformat.NotebookNode) -> str:
    if cell.cell_type == "markdown":
        return cell.source
    parts = [f"```python\n{cell.source}\n```"]
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            parts.append(f"![Figure](data:image/png;base64,{data['image/png'].strip()})")
        else:
            text = output.get("text") or data["text/plain"]
            parts.append(f'```{{ .text .output title="Output" }}\n{text.rstrip()}\n```')
    return "\n\n".join(parts)
