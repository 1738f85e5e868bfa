// Runs every driver and says which entry points were driven.

#include "driver.h"

void drive_causal_conv1d();
void drive_int8_weight();
void drive_linear();
void drive_norms();
void drive_quantize();
void drive_read_memory();
void drive_selective_scan();
void drive_ssd_scan();
void drive_sum_raw();
void drive_tape();

int main() {
  drive_linear();
  drive_int8_weight();
  drive_norms();
  drive_causal_conv1d();
  drive_selective_scan();
  drive_ssd_scan();
  drive_quantize();
  drive_sum_raw();
  drive_read_memory();
  drive_tape();
  return drive::verdict();
}
