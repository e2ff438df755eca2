"""The catalogue: every system that fewstep is for, with what it needs, what it gives and whether it works here.

The rows of methods that work come from their classes; the others are listed here, the planned ones and those that
train nothing.  A row that says ``works`` names its class, its test against a known answer, its test on real data and
its page; a test holds it to that.  ``evidence`` says how well our reading is backed: ``verified`` against the authors'
code, ``from paper text``, or ``reconstructed`` where the paper leaves a choice.  Planned rows have none yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.paper import Evidence

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One published system.  ``title`` is the paper's; ``needs`` and ``calls`` (of the network, a sample) are a few
    words for people; the paths are relative to the repository."""

    key: str
    name: str
    year: int
    arxiv: str
    family: str
    needs: str
    calls: str
    title: str
    about: str
    state: Literal["planned", "works"] = "planned"
    cls: str | None = None
    evidence: Evidence | None = None
    exact_test: str | None = None
    real_test: str | None = None
    docs_page: str | None = None


def works(row: Row, cls: str, evidence: Evidence, test: str, page: str, real: str) -> Row:
    """The row of a system that works: its class inside the package, and the names of its tests and its page."""
    return replace(
        row,
        state="works",
        cls=f"fewstep.{cls}",
        evidence=evidence,
        exact_test=f"tests/exact/test_{test}.py",
        real_test=f"tests/real/test_{real}.py",
        docs_page=f"docs/systems/{page}.md",
    )


def of_methods() -> Iterator[Row]:
    """The rows of the methods that stand for a paper; their tests are named after their files."""
    for name, place in RECIPES.items():
        cls = recipe_class(name)
        paper, system = cls.paper, vars(cls).get("system")
        if system is None:
            continue
        row = Row(
            name, system.name, system.year, paper.arxiv, system.family, system.needs, system.calls, paper.title,
            system.about,
        )  # fmt: skip
        file = place.partition(":")[0].rpartition(".")[2]
        place = place.removeprefix("fewstep.")
        yield works(row, place, paper.evidence, file, system.page or name, system.real)


@cache
def systems() -> tuple[Row, ...]:
    """All rows, family by family; a planned system is left out once a method stands for its paper."""
    made = list(of_methods())
    done = {row.arxiv for row in made}
    rows = [*made, *(row for row in LISTED if row.arxiv not in done)]
    families = list(dict.fromkeys(row.family for row in LISTED))
    return tuple(sorted(rows, key=lambda row: (families.index(row.family), row.state != "works", row.year)))


S = Row
LISTED: tuple[Row, ...] = (
    # few steps now: no training
    works(S("deis", "DEIS", 2022, "2204.13902", "solvers", "teacher", "5-20",
            "Fast Sampling of Diffusion Models with Exponential Integrator",
            "exponential integrators with polynomial extrapolation of the noise prediction"),
          "sampling.solvers.deis:TAB", "verified", "solver_families", "deis", "solvers"),
    works(S("dpm-solver++", "DPM-Solver++", 2022, "2211.01095", "solvers", "teacher", "10-20",
            "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
            "high-order exponential solvers in data prediction, for guided sampling"),
          "sampling.solvers.dpm_solver:DPMSolverPP3M", "verified", "solver_families", "dpm-solver-pp", "solvers"),
    works(S("dpm-solver-v3", "DPM-Solver-v3", 2023, "2310.13268", "solvers", "teacher, a little data", "5-20",
            "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics",
            "a solver whose linear terms are fitted to statistics of the network"),
          "sampling.solvers.dpm_solver_v3:DPMSolverV3", "verified", "dpm_solver_v3", "dpm-solver-v3",
          "dpm_solver_v3_real"),
    works(S("dualfast", "DualFast", 2025, "2506.13058", "solvers", "teacher", "5-20",
            "DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models",
            "reduces the network's own error by mixing in a cached, noisier prediction"),
          "sampling.solvers.dualfast:DualFast", "reconstructed", "solver_families", "dualfast", "solvers"),
    works(S("dpm-ot", "DPM-OT", 2023, "2307.11308", "solvers", "teacher, data", "5-10",
            "DPM-OT: A New Diffusion Probabilistic Model Based on Optimal Transport",
            "jumps from noise to an intermediate latent by semi-discrete optimal transport"),
          "sampling.dpm_ot.expressway:Expressway", "verified", "dpm_ot", "dpm-ot", "dpm_ot_real"),
    works(S("autoguidance", "Autoguidance", 2024, "2406.02507", "solvers", "teacher and a worse one", "any",
            "Guiding a Diffusion Model with a Bad Version of Itself",
            "guides a model away from a smaller, less trained version of itself"),
          "guidance:Autoguided", "verified", "autoguidance", "autoguidance", "autoguidance_real"),
    # consistency
    S("ctm", "CTM", 2023, "2310.02279", "consistency", "teacher, data", "1 and more",
      "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion",
      "one network for every jump along a trajectory, with a GAN"),
    S("scott", "SCott", 2024, "2403.01505", "consistency", "teacher, data", "1-4",
      "SCott: Accelerating Diffusion Models with Stochastic Consistency Distillation",
      "consistency distillation with a stochastic teacher solver"),
    S("mlcm", "MLCM", 2024, "2406.05768", "consistency", "teacher", "2-8",
      "MLCM: Multistep Consistency Distillation of Latent Diffusion Model",
      "consistency in a few segments of the trajectory, for latent models"),
    S("hyper-sd", "Hyper-SD", 2024, "2404.13686", "consistency", "teacher, data", "1-8",
      "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis",
      "trajectory-segmented consistency, then feedback and score distillation"),
    S("tbcm", "TBCM", 2025, "2511.20410", "consistency", "teacher", "1, 2",
      "Image-Free Timestep Distillation via Continuous-Time Consistency with Trajectory-Sampled Pairs",
      "continuous-time consistency on states of the teacher's own trajectories: no images"),
    S("sana-sprint", "SANA-Sprint", 2025, "2503.09641", "consistency", "flow teacher, data", "1-4",
      "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation",
      "a flow-matching teacher as a TrigFlow one, continuous-time consistency and a GAN"),
    S("rcm", "rCM", 2025, "2510.08431", "consistency", "teacher, data", "1-4",
      "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency",
      "continuous-time consistency regularised by score distillation, at scale"),
    # distribution matching
    S("dmd", "DMD", 2023, "2311.18828", "matching", "teacher, pairs", "1",
      "One-step Diffusion with Distribution Matching Distillation",
      "a one-step generator along the difference of two scores, with a regression on pairs"),
    S("msd", "MSD", 2024, "2410.23274", "matching", "teacher, data", "1",
      "Multi-student Diffusion Distillation for Better One-step Generators",
      "several students, each for a part of the conditions, possibly smaller than the teacher"),
    S("f-distill", "f-distill", 2025, "2502.15681", "matching", "teacher, data", "1",
      "One-step Diffusion Models with f-Divergence Distribution Matching",
      "distribution matching for any f-divergence, by a weight on each sample"),
    S("swiftbrush", "SwiftBrush", 2023, "2312.05239", "matching", "text teacher", "1",
      "SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
      "variational score distillation for one-step text-to-image, without images"),
    S("disback", "DisBack", 2024, "2408.15991", "matching", "teacher", "1",
      "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
      "records how a teacher degrades into the student and follows that path back"),
    S("flash-dmd", "Flash-DMD", 2025, "2511.20549", "matching", "teacher, data, reward", "4",
      "Flash-DMD: Towards High-Fidelity Few-Step Image Generation with Efficient Distillation and "
      "Joint Reinforcement Learning",
      "time-dependent distribution matching with reinforcement learning beside it"),
    # tuning
    S("hipa", "HiPA", 2023, "2311.18158", "tuning", "text teacher", "1",
      "HiPA: Enabling One-Step Text-to-Image Diffusion Models via High-Frequency-Promoting Adaptation",
      "a low-rank adapter that adds the high frequencies one step lacks"),
    S("diversity", "Distilling Diversity and Control", 2025, "2503.10637", "tuning", "teacher and student", "4",
      "Distilling Diversity and Control in Diffusion Models",
      "the base model for the first step, the student for the rest; control adapters carry over"),
    S("pso", "PSO", 2024, "2410.03190", "tuning", "student, preferences", "1-4",
      "Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization",
      "preference tuning of few-step students by pairs of samples"),
    # flow maps and rectified flow
    S("ayf", "Align Your Flow", 2025, "2506.14603", "flow maps", "teacher and a worse one, data", "1-8",
      "Align Your Flow: Scaling Continuous-Time Flow Map Distillation",
      "continuous-time flow maps with autoguidance, Eulerian and Lagrangian"),
    S("caf", "Constant Acceleration Flow", 2024, "2411.00322", "flow maps", "pairs", "2 and more",
      "Constant Acceleration Flow",
      "paths with a learned constant acceleration instead of straight lines"),
    S("slimflow", "SlimFlow", 2024, "2407.12718", "flow maps", "pairs", "1",
      "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow",
      "reflow into a smaller network, annealed from random to teacher pairs"),
    S("guided-distillation", "Guided distillation", 2022, "2210.03142", "flow maps", "teacher, data", "1-16",
      "On Distillation of Guided Diffusion Models",
      "guidance as an input of one network, then progressive distillation"),
    S("mdt-dist", "MDT-dist", 2025, "2509.04406", "flow maps", "3-D flow teacher", "1, 2",
      "Few-step Flow for 3D Generation via Marginal-Data Transport Distillation",
      "few-step flow for 3-D generation by matching velocities and their distribution"),
    S("meanflow", "MeanFlow", 2025, "2505.13447", "flow maps", "data", "1, 2",
      "Mean Flows for One-step Generative Modeling",
      "the mean velocity between two times, learned from data"),
    S("shortcut", "Shortcut Models", 2024, "2410.12557", "flow maps", "data", "1 and more",
      "One Step Diffusion via Shortcut Models",
      "one network for every step size, two half steps as the target of one"),
    # other modalities
    S("tgs", "TriplaneGaussian", 2023, "2312.09147", "scenes", "pictures of objects", "1",
      "Triplane Meets Gaussian Splatting: Fast and Generalizable Single-View 3D Reconstruction with Transformers",
      "a triplane and points decoded into 3-D Gaussians from one picture"),
    S("prolificdreamer", "ProlificDreamer", 2023, "2305.16213", "scenes", "text teacher", "-",
      "ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation",
      "variational score distillation of a scene through its renderer"),
    S("consistent3d", "Consistent3D", 2024, "2401.09050", "scenes", "text teacher", "-",
      "Consistent3D: Towards Consistent High-Fidelity Text-to-3D Generation with Deterministic Sampling Prior",
      "consistency distillation sampling with fixed noise for text to 3-D"),
    S("streamdit", "StreamDiT", 2025, "2507.03745", "video", "video teacher", "8",
      "StreamDiT: Real-Time Streaming Text-to-Video Generation",
      "streaming video with a moving window of noise levels, multistep distillation"),
    S("efficient-vdit", "Efficient-vDiT", 2025, "2502.06155", "video", "video teacher", "20",
      "Efficient-vDiT: Efficient Video Diffusion Transformers With Attention Tile",
      "tiled attention and multistep consistency distillation"),
    S("ditto-2", "DITTO-2", 2024, "2405.20289", "audio", "music teacher", "1-8",
      "DITTO-2: Distilled Diffusion Inference-Time T-Optimization for Music Generation",
      "controls music by optimising the noise through a distilled sampler"),
    # few examples, small students, language
    works(S("rs2", "RS2", 2023, "2305.18424", "condense", "data", "-",
            "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning",
            "a fresh random subset every round, in any training: the baseline to beat"),
          "training.orders:WithoutReplacement", "verified", "rs2", "rs2", "rs2_real"),
    S("ast", "AST", 2023, "2310.10541", "condense", "labelled data", "-",
      "Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories",
      "dataset distillation along smooth expert trajectories"),
    S("cv-dd", "CV-DD", 2025, "2501.07575", "condense", "labelled data", "-",
      "Dataset Distillation via Committee Voting",
      "dataset distillation by a committee of models with batch-specific soft labels"),
    S("pca", "PCA", 2025, "2502.06434", "condense", "labelled data", "-",
      "Rethinking Large-scale Dataset Compression: Shifting Focus From Labels to Images",
      "prune, combine and augment images, with hard labels only"),
    S("dq", "Dataset Quantization", 2023, "2308.10524", "condense", "labelled data", "-",
      "Dataset Quantization",
      "bins of diverse samples, sampled evenly, with patches dropped"),
    S("rad", "RAD", 2022, "2210.01213", "condense", "unlabelled data, teacher", "-",
      "Robust Active Distillation",
      "queries the teacher where the student gains most, robustly"),
    S("diswot", "DisWOT", 2023, "2303.15678", "students", "teacher", "-",
      "DisWOT: Student Architecture Search for Distillation WithOut Training",
      "searches a student architecture without training, by similarity to the teacher"),
    S("distillspec", "DistillSpec", 2023, "2310.08461", "language", "draft and target models", "-",
      "DistillSpec: Improving Speculative Decoding via Knowledge Distillation",
      "distils the draft model so that speculative decoding accepts more"),
    S("redi", "REDI", 2025, "2505.24850", "language", "right and wrong traces", "-",
      "Harnessing Negative Signals: Reinforcement Distillation from Teacher Data for LLM Reasoning",
      "learns from wrong reasoning traces too, with an asymmetric loss"),
)  # fmt: skip


def systems_table() -> Table:
    """The catalogue as a table for the terminal, what works first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("key", "state", "calls", "system, what it needs and what it does", box=SIMPLE_HEAD)
    table.title, table.padding = f"{len(systems())} systems", (0, 0, 0, 1)
    for row in sorted(systems(), key=lambda row: row.state != "works"):
        state = "[green]works[/]" if row.state == "works" else "planned"
        about = f"[bold]{row.name}[/] ({row.year}), from {row.needs}: {row.about}"
        table.add_row(row.key, state, row.calls, about)
    return table


def markdown() -> str:
    """The catalogue as a page of the documentation."""
    working = sum(row.state == "works" for row in systems())
    lines = [
        "# Catalogue",
        "",
        "This page is made from `fewstep.catalogue` by `tools/make_docs.py`.",
        "",
        f"{len(systems())} systems; {working} work, the others are planned.  *Evidence* says how our reading is "
        "backed: `verified` against the authors' code, `from paper text`, or `reconstructed`.",
    ]
    for family in dict.fromkeys(row.family for row in systems()):
        lines += ["", f"## {family.capitalize()}", "", "| system | needs | calls | state | evidence | what it does |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in (row for row in systems() if row.family == family):
            page = f"[{row.name}]({row.docs_page.removeprefix('docs/')})" if row.docs_page else row.name
            paper = f"{page}: *{row.title}* ({row.year}, arXiv {row.arxiv})"
            lines.append(f"| {paper} | {row.needs} | {row.calls} | {row.state} | {row.evidence or '-'} | {row.about} |")
    return "\n".join(lines) + "\n"
