"""The circuit on IBM Quantum: `quantum_backend: ibm`, on a device or on a fake one."""

import logging

logging.getLogger(__name__).setLevel(logging.INFO)  # Axolotl shows warnings only; jobs cost money
