# SPDX-License-Identifier: Apache-2.0
# Sets TENSORRT_INCLUDE to a folder with TensorRT's headers and CUDA_INCLUDE to one with CUDA's, or says what is missing.
# Headers are all that the plugin needs. In order: TENSORRT_ROOT (CMake or environment), the system, and the public
# TensorRT repository at a pinned tag, unless DELTAWEAVE_FETCH_TENSORRT is OFF.
set(TENSORRT_TAG v10.14)

find_package(CUDAToolkit QUIET)
if(NOT CUDAToolkit_FOUND)
  set(TENSORRT_MISSING "no CUDA toolkit found")
  return()
endif()

find_path(TENSORRT_INCLUDE NvInferRuntime.h
  HINTS "${TENSORRT_ROOT}" "$ENV{TENSORRT_ROOT}"
  PATH_SUFFIXES include include/x86_64-linux-gnu)
if(TENSORRT_INCLUDE)
  return()
endif()

if(DELTAWEAVE_FETCH_TENSORRT)
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/tensorrt-${TENSORRT_TAG}")
  set(complete ON)
  foreach(header NvInfer NvInferImpl NvInferLegacyDims NvInferPluginBase NvInferRuntime NvInferRuntimeBase
          NvInferRuntimeCommon NvInferRuntimePlugin NvInferVersion)
    if(complete AND NOT EXISTS "${folder}/${header}.h")
      file(DOWNLOAD "https://raw.githubusercontent.com/NVIDIA/TensorRT/${TENSORRT_TAG}/include/${header}.h"
        "${folder}/${header}.h.part" STATUS status INACTIVITY_TIMEOUT 10 TIMEOUT 60)
      list(GET status 0 code)
      if(code EQUAL 0)
        file(RENAME "${folder}/${header}.h.part" "${folder}/${header}.h")
      else()
        file(REMOVE "${folder}/${header}.h.part")
        set(complete OFF)
      endif()
    endif()
  endforeach()
  if(complete)
    set(TENSORRT_INCLUDE "${folder}" CACHE PATH "TensorRT's headers" FORCE)
    return()
  endif()
endif()
set(TENSORRT_MISSING "TensorRT's headers not found; set TENSORRT_ROOT to a folder that has include/NvInferRuntime.h")
