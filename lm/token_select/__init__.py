# SPDX-License-Identifier: Apache-2.0
"""TokenSelect (arXiv 2411.02886): attention that reads only the cached tokens a step needs."""
