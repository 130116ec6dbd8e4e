# SPDX-License-Identifier: Apache-2.0
"""`python -m deltaweave`."""

from deltaweave.cli import main

if __name__ == "__main__":
    main()
